"""The replica check: any single flipped bit is reported with its leaf and device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.replicas import Replicas, bit_hash


def one_ulp(x: np.ndarray, where: int = 0) -> np.ndarray:
    """`x` with the lowest bit of its element `where` flipped."""
    changed = np.array(x, order="C")
    changed.reshape(-1).view(f"u{x.dtype.itemsize}")[where] ^= 1
    return changed


def corrupted(x: jax.Array, number: int) -> jax.Array:
    """`x` with one bit flipped in the replica on device `number`."""
    buffers = [
        jax.device_put(one_ulp(np.asarray(s.data)) if s.device.id == number else s.data, s.device)
        for s in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, buffers)


@pytest.fixture
def tree(mesh_of):
    """Leaves sharded as those of a run, on data 2 x fsdp 2 x expert 2."""
    mesh = mesh_of(data=2, fsdp=2, expert=2)

    def put(spec, shape, dtype=jnp.float32):
        values = jnp.arange(np.prod(shape)).reshape(shape).astype(dtype)
        return jax.device_put(values, NamedSharding(mesh, P(*spec)))

    return {
        "experts": put(("expert", "fsdp"), (4, 6, 5)),
        "kernel": put((None, "fsdp"), (3, 8), jnp.bfloat16),
        "norm": put((), (5,)),
        "rows": put((("data", "fsdp", "expert"),), (16,)),  # no replicas: nothing to compare
        "step": put((), (), jnp.int32),
    }


def test_equal_copies_pass_and_one_bit_names_leaf_and_device(tree):
    replicas = Replicas(tree)
    assert replicas.compare(tree) == []
    # Devices by coordinates (data, fsdp, expert): id = 4 data + 2 fsdp + expert.
    expected = {
        ("norm", 5): ([5], [0, 1, 2, 3, 4, 6, 7]),
        ("step", 0): ([0], [1, 2, 3, 4, 5, 6, 7]),
        ("kernel", 6): ([6], [2, 3, 7]),  # the devices with the same shard over fsdp
        ("experts", 3): ([3, 7], []),  # two replicas: either may be wrong
    }
    for (leaf, number), (odd, others) in expected.items():
        wrong = tree | {leaf: corrupted(tree[leaf], number)}
        [found] = replicas.compare(wrong)
        assert found.leaf == leaf
        assert [device.id for device in found.odd] == odd
        assert [device.id for device in found.others] == others
    assert replicas.compare(tree | {"rows": corrupted(tree["rows"], 1)}) == []


def test_several_devices_and_leaves(tree):
    wrong = corrupted(corrupted(tree["norm"], 2), 7)
    found = Replicas(tree).compare(tree | {"norm": wrong, "step": corrupted(tree["step"], 1)})
    assert [(each.leaf, [device.id for device in each.odd]) for each in found] == [
        ("norm", [2, 7]),
        ("step", [1]),
    ]


def test_one_device_has_nothing_to_compare(mesh_of):
    x = jax.device_put(jnp.ones(3), NamedSharding(mesh_of(), P()))
    assert Replicas({"x": x}).compare({"x": x}) == []


hashed = jax.jit(bit_hash)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_change_of_one_element_changes_the_hash(dtype, data):
    x = np.asarray(jnp.arange(24).reshape(2, 3, 4).astype(dtype))
    where = data.draw(st.integers(0, x.size - 1))
    other = x.copy()
    bits = other.reshape(-1).view(f"u{x.dtype.itemsize}")
    largest = 1 if dtype == "bool" else 2 ** (8 * x.dtype.itemsize) - 1
    bits[where] = data.draw(st.integers(0, largest).filter(lambda n: n != bits[where]))
    assert hashed(x) != hashed(other)


def test_both_halves_of_a_wide_word_count(x64):
    x = np.arange(6.0)
    assert len({int(hashed(y)) for y in (x, one_ulp(x, 4), x + 2.0**-40, -x)}) == 4


def test_a_value_that_changes_places_changes_the_hash():
    """The bits of 1.0 and 2.0 differ by a power of two: linear weights would give equal sums."""
    rows = jnp.ones((512, 512)) + jnp.eye(512)
    assert len(set(np.asarray(jax.vmap(bit_hash)(rows)).tolist())) == 512


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_kept_axes_have_a_hash_for_each_index(kept):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    found = bit_hash(x, kept)
    assert found.shape == x.shape[:kept]
    for index in np.ndindex(found.shape):
        assert found[index] == bit_hash(x[index])


def test_kept_axes_and_both_halves_of_a_wide_word(x64):
    x = np.arange(6.0).reshape(2, 3)
    assert bit_hash(jnp.asarray(x), 1).shape == (2,)
    old, new = (np.asarray(bit_hash(jnp.asarray(y), 1)) for y in (x, one_ulp(x, 5)))
    assert (old != new).tolist() == [False, True]
