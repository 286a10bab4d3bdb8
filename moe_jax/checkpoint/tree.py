"""Names, shapes and digests of the leaves of a checkpoint."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from moe_jax.errors import UserError
from moe_jax.files import formats

Leaf: TypeAlias = jax.ShapeDtypeStruct
_SLACK = 64 * 2**20  # bytes besides the arrays: metadata, partly filled disk blocks


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by name, such as `params/blocks/3/moe/w_in`, in tree order.

    Dict keys, sequence indices and NamedTuple fields are joined by `/`.  An nnx Variable is a leaf:
    its attribute `value` is not part of the name.

    Raises:
      ValueError: two leaves have the same name.
    """
    names: dict[str, Any] = {}
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
            path = path[:-1]
        name = keystr(path, simple=True, separator="/")
        if name in names:
            raise ValueError(f"two leaves are called {name!r}")
        names[name] = leaf
    return names


def abstract(leaf: Any) -> Leaf:
    """Return the shape, dtype and sharding (None: not on a device) of an array or scalar.

    Raises:
      TypeError: `leaf` is a typed PRNG key; store `jax.random.key_data` of it.
    """
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError("a typed PRNG key has no stable bytes: store jax.random.key_data(key)")
    return Leaf(tuple(leaf.shape), leaf.dtype, sharding=getattr(leaf, "sharding", None))


def check_same(where: str, saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> None:
    """Raise UserError naming the first leaf that is absent, or differs in shape or dtype."""
    names = set(saved) | set(wanted)
    # Parameters first: users know them, and the optimizer's leaves follow from them.
    for name in sorted(names, key=lambda name: (not name.startswith("params/"), name)):
        old, new = saved.get(name), wanted.get(name)
        there, here = _text(old), _text(new)
        moment = name.startswith("optimizer/")
        if moment and old is not None and new is not None and old.shape != new.shape:
            # Parameters and names agree: the same optimizer stored its state in another layout.
            raise UserError(
                f"{where} holds the optimizer's state in another layout: {name} is {there} in the "
                f"checkpoint and {here} in this config; use another --workdir (with --init_from "
                f"to keep the weights)."
            )
        if there != here:
            raise UserError(
                f"{where} holds another model or optimizer: {name} is {there} in the checkpoint "
                f"and {here} in this config; use the config of that run or another --workdir."
            )


def _text(leaf: Leaf | None) -> str:
    if leaf is None:
        return "absent"
    return f"{np.dtype(leaf.dtype).name}[{','.join(str(n) for n in leaf.shape)}]"


def array_digest(leaves: Iterable[tuple[str, Any]]) -> str:
    """The SHA-256 (64 hex digits) of named arrays, independent of devices, mesh and file layout.

    It covers, for each leaf in order of name: name, dtype, shape, then the little-endian bytes.

    Args:
      leaves: (name, array) in ascending order of name, so that a checkpoint larger than memory
        can be streamed.  This host must be able to read each whole array.

    Raises:
      ValueError: the names are out of order.
    """
    digest = hashlib.sha256()
    previous = ""
    for name, leaf in leaves:
        if name <= previous:
            raise ValueError(f"{name!r} comes after {previous!r}: sort the leaves by name")
        previous = name
        array = np.ascontiguousarray(leaf)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        shape = ",".join(str(n) for n in np.shape(leaf))
        digest.update(f"{name}\0{array.dtype.name}\0{shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def disk_needed(tree: Any) -> int:
    """Disk bytes that one checkpoint of `tree` (arrays or structs) needs, plus a margin."""
    leaves = [abstract(leaf) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves) + _SLACK


def free_bytes(root: os.PathLike[str] | str) -> int | None:
    """Free bytes on the file system of `root`, which need not exist.

    None for remote paths such as gs://, because object stores report no free space.
    """
    if "://" in os.fspath(root):
        return None
    path = epath.Path(root).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk(root: os.PathLike[str] | str, needed: int) -> None:
    """Raise UserError if the file system of `root` (which need not exist) lacks `needed` bytes."""
    free = free_bytes(root)
    if free is not None and free < needed:
        raise UserError(
            f"A checkpoint needs {formats.size(needed)} and {root} has {formats.size(free)} free: "
            f"make room or choose another --workdir."
        )
