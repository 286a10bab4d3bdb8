"""Whether the devices that hold the same part of an array hold the same bits of it.

Each device hashes what it holds; only the hashes travel.  Faulty memory or arithmetic changes one
copy, from which the others are then never restored: every copy is updated where it lies.
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
    """Copies of one part of a leaf that are not the same."""

    leaf: str  # such as `params/blocks/0/attention/query`
    odd: list[Any]  # devices outside of the majority; all of them where there is none
    others: list[Any]  # devices that agree


class Replicas:
    """Compares the copies of every leaf that has several.

    Args:
      tree: arrays or ShapeDtypeStructs, each with a NamedSharding on the same mesh.  Copies of a
        part lie on the devices that differ only in mesh axes which its spec leaves out.
    """

    def __init__(self, tree: Any):
        # Of each leaf that has copies: its name, its place among all, and the mesh axes, by number,
        # over which it is copied.
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
        self._mesh: Mesh | None = None  # None: no leaf has copies
        self._hash: Any = None  # compiled: leaves -> hashes
        if shardings:
            self._mesh = typing.cast(Mesh, shardings[0].mesh)  # of devices, not abstract
            self._hash = _table(self._mesh, shardings).lower(self._leaves(tree)).compile()

    def compare(self, tree: Any) -> list[Difference]:
        """What differs, in the order of the leaves; every process must call this and gets the same.

        Args:
          tree: like that of `__init__`.
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
    """A hash of the bits of `x` and of their places; any change of one word changes it.

    Args:
      x: an array of any dtype.
      kept: leading axes whose every index has a hash of its own; 0: one hash of the whole.

    Returns:
      An array of the shape of the kept axes.

    The sum, modulo 2^32, of one number for each 32-bit word (narrower values: each a word).  That
    number is a bijection of the word: a constant of the place is added, then come multiplications
    by odd numbers and xors with the number's own upper bits, all of which can be undone.  So
    another word gives another summand and, the rest being equal, another sum.  Changes of several
    words go unnoticed with a probability of 2^-32.  (The multipliers are those of MurmurHash3.)
    """
    words = _words(x)
    place = jnp.zeros((), jnp.uint32)
    hashed = range(kept, words.ndim)
    for axis in hashed:  # no reshape, which would copy on TPUs
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
    """Jitted: leaves -> hashes [devices, leaves], whole on each device."""
    specs = [sharding.spec for sharding in shardings]

    def local(leaves: list[Array]) -> Array:
        return jnp.stack([bit_hash(leaf) for leaf in leaves])[None]

    # Without the checks of what varies over which axis: to them copies are equal.
    hashes = jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=P(mesh.axis_names), check_vma=False
    )
    return jax.jit(hashes, out_shardings=NamedSharding(mesh, P()))


def _copied_axes(sharding: NamedSharding) -> tuple[int, ...]:
    """Numbers of the mesh axes that hold copies."""
    split: set[str] = set()
    for entry in sharding.spec:
        split |= {entry} if isinstance(entry, str) else set(entry or ())
    shape = sharding.mesh.shape
    axes = [n for n, name in enumerate(shape) if name not in split]
    return tuple(axes) if math.prod(list(shape.values())[n] for n in axes) > 1 else ()


def _groups(
    mesh: Mesh, axes: tuple[int, ...], hash_D: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(devices, hashes) of each group of devices that hold the same part."""
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
