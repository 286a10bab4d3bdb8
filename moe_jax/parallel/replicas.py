"""Checks that replicas, the devices that hold the same shard of an array, hold the same bits.

Each device hashes its shards, and only the hashes are sent.  Faulty memory or arithmetic changes
one replica, and training never repairs it: each replica is updated on its own device.

N leaves with replicas, D devices.
"""

import collections
import math
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped, UInt32

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: steps of it visit all words


class Difference(NamedTuple):
    """Replicas of one shard of a leaf that differ."""

    leaf: str  # such as `params/blocks/0/attention/q_DHA`
    odd: list[Any]  # devices outside the majority; all of them if there is no majority
    others: list[Any]  # devices of the majority


class Replicas:
    """Compares the replicas of every leaf that has several.

    Args:
      tree: arrays or ShapeDtypeStructs, each with a NamedSharding on the same mesh.  The replicas
        of a shard are the devices that differ only in mesh axes absent from its spec.
    """

    def __init__(self, tree: Any):
        # Per leaf with replicas: its name, its index among all leaves, and the numbers of the mesh
        # axes over which it is replicated.
        self._names: list[str] = []
        self._places: list[int] = []
        self._copied: list[tuple[int, ...]] = []
        shardings: list[NamedSharding] = []
        for place, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
            axes = _copied_axes(leaf.sharding)
            if axes:
                self._names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
                self._places.append(place)
                self._copied.append(axes)
                shardings.append(leaf.sharding)
        self._mesh: Mesh | None = None  # None: no leaf has replicas
        self._hash: Any = None  # compiled: leaves -> hashes
        if shardings:
            self._mesh = typing.cast(Mesh, shardings[0].mesh)  # not an AbstractMesh
            self._hash = _table(self._mesh, shardings).lower(self._leaves(tree)).compile()

    def compare(self, tree: Any) -> list[Difference]:
        """The differences in the order of the leaves.

        All processes must call this; all get the same result.

        Args:
          tree: arrays with the structure and shardings of the tree given to `__init__`.
        """
        if self._mesh is None:
            return []
        table = self._hash(self._leaves(tree))
        hash_ND = np.asarray(table.addressable_data(0)).T
        found = []
        for name, axes, hash_D in zip(self._names, self._copied, hash_ND, strict=True):
            for devices, copies in _groups(self._mesh, axes, hash_D):
                if (copies != copies[0]).any():
                    found.append(_difference(name, devices, copies))
        return found

    def _leaves(self, tree: Any) -> list[Any]:
        leaves = jax.tree.leaves(tree)
        return [leaves[place] for place in self._places]


def bit_hash(x: Shaped[Array, "..."], kept: int = 0) -> UInt32[Array, "..."]:
    """A hash of the bits of `x` and their positions; changing any one word changes the hash.

    The hash is a sum modulo 2^32 with one summand per 32-bit word (a narrower value is widened to a
    word).  The summand is a bijection of the word: it adds a constant that depends on the position,
    multiplies by odd numbers and xors with its own upper bits, all of which are invertible.  A
    changed word therefore changes its summand and, if all other words are equal, the sum.  Changes
    of several words go unnoticed with a probability of 2^-32.

    Args:
      x: an array of any dtype.
      kept: number of leading axes to keep, with one hash per index of them; 0: one hash of `x`.

    Returns:
      An array of the shape of the kept axes.

    Reference: the multipliers are those of MurmurHash3.
    """
    words = _words(x)
    place = jnp.zeros((), jnp.uint32)
    hashed = range(kept, words.ndim)
    for axis in hashed:  # a reshape would copy on TPUs
        place = place * np.uint32(words.shape[axis] % 2**32) + jax.lax.broadcasted_iota(
            jnp.uint32, words.shape, axis
        )
    mixed = words + place * np.uint32(_GOLDEN)
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), axis=tuple(hashed), dtype=jnp.uint32)


def _words(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = 8 * x.dtype.itemsize
    if bits >= 32:  # 64 bits become two words, along a new last axis
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)


def _table(mesh: Mesh, shardings: list[NamedSharding]) -> Any:
    """Jitted: leaves -> hashes [devices, leaves], replicated on every device."""
    specs = [sharding.spec for sharding in shardings]

    def local(leaves: list[Array]) -> Array:
        return jnp.stack([bit_hash(leaf) for leaf in leaves])[None]

    # check_vma would assume that replicas are equal, which is what this function tests.
    hashes = jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=P(mesh.axis_names), check_vma=False
    )
    return jax.jit(hashes, out_shardings=NamedSharding(mesh, P()))


def _copied_axes(sharding: NamedSharding) -> tuple[int, ...]:
    """Numbers of the mesh axes over which the array is replicated."""
    split: set[str] = set()
    for entry in sharding.spec:
        split |= {entry} if isinstance(entry, str) else set(entry or ())
    shape = sharding.mesh.shape
    axes = [n for n, name in enumerate(shape) if name not in split]
    return tuple(axes) if math.prod(list(shape.values())[n] for n in axes) > 1 else ()


def _groups(
    mesh: Mesh, axes: tuple[int, ...], hash_D: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(devices, hashes) of each group of devices that hold the same shard."""
    last = range(-len(axes), 0)
    size = math.prod(mesh.devices.shape[axis] for axis in axes)
    devices = np.moveaxis(mesh.devices, axes, last).reshape(-1, size)
    hashes = np.moveaxis(hash_D.reshape(mesh.devices.shape), axes, last).reshape(-1, size)
    yield from zip(devices, hashes, strict=True)


def _difference(name: str, devices: np.ndarray, hashes: np.ndarray) -> Difference:
    [(common, count)] = collections.Counter(hashes.tolist()).most_common(1)
    if 2 * count <= len(hashes):
        return Difference(name, devices.tolist(), [])
    good = hashes == common
    return Difference(name, devices[~good].tolist(), devices[good].tolist())
