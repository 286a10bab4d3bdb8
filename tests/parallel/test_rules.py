"""The table of logical axes refuses entries that would shard wrongly without an error."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.mesh import BATCH_AXES
from moe_jax.parallel.rules import RULES, check_rules, param_sharding, sharding, spec


def test_a_tensor_gets_the_mesh_axes_of_its_names(mesh_of):
    assert spec(("batch", None, "heads")) == P(BATCH_AXES, None, "tensor")
    assert spec(("norm", "head_dim")) == P(None, None)
    w_EDF = jax.device_put(
        jax.numpy.zeros((4, 6, 8)),
        sharding(mesh_of(fsdp=2, expert=2, tensor=2), ("experts", "expert_embed", "expert_mlp")),
    )
    assert {shard.data.shape for shard in w_EDF.addressable_shards} == {(2, 3, 4)}


@pytest.mark.parametrize(
    ("experts", "split"),
    [
        (8, P(("expert", "fsdp"), None, None, "tensor")),  # two whole experts per device
        (6, P("expert", "fsdp", None, "tensor")),  # 3 experts per shard are not divisible by fsdp
    ],
)
def test_fsdp_splits_experts_before_their_width(mesh_of, experts, split):
    mesh, axes = mesh_of(fsdp=2, expert=2), ("experts", "expert_embed", None, "expert_mlp")
    assert param_sharding(mesh, axes, (experts, 4, 2, 6)).spec == split
    stacked = param_sharding(mesh, ("layers", *axes), (3, experts, 4, 2, 6)).spec
    assert stacked == P(None, *split)


def test_what_holds_no_experts_lies_as_its_names_say(mesh_of):
    mesh = mesh_of(fsdp=2, tensor=2)
    assert param_sharding(mesh, ("embed", "mlp"), (8, 8)).spec == P("fsdp", "tensor")


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        (("embed", "widht"), "unknown logical axes .*widht"),
        (("heads", None, "heads"), "repeat a name"),
        (("mlp", "vocab"), "use one mesh axis twice"),  # both map to tensor
        (("batch", "embed"), "use one mesh axis twice"),  # fsdp is also an axis of the batch
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
