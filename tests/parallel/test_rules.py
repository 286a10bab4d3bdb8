"""The table of logical axes refuses what would shard silently wrong."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.mesh import BATCH_AXES
from moe_jax.parallel.rules import RULES, check_rules, sharding, spec


def test_a_tensor_gets_the_mesh_axes_of_its_names(mesh_of):
    assert spec(("batch", None, "heads")) == P(BATCH_AXES, None, "tensor")
    assert spec(("norm", "length")) == P(None, None)
    w_EDF = jax.device_put(
        jax.numpy.zeros((4, 6, 8)),
        sharding(mesh_of(fsdp=2, expert=2, tensor=2), ("experts", "expert_embed", "expert_mlp")),
    )
    assert {shard.data.shape for shard in w_EDF.addressable_shards} == {(2, 3, 4)}


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        (("embed", "widht"), "unknown logical axes .*widht"),
        (("heads", None, "heads"), "repeat a name"),
        (("mlp", "vocab"), "use one mesh axis twice"),  # both stand for tensor
        (("batch", "embed"), "use one mesh axis twice"),  # fsdp is one of the batch's
    ],
)
def test_impossible_tensors_are_refused(axes, complaint):
    with pytest.raises(ValueError, match=complaint):
        spec(axes)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [(("modle",), "unknown mesh axes .*modle"), (("data", "data"), "repeats a mesh axis")],
)
def test_an_impossible_table_is_refused(entry, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_rules({**RULES, "new": entry})
