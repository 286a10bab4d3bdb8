"""Checks that a mesh can split the parameters of a model."""

import jax
from jax.sharding import AbstractMesh, Mesh

from moe_jax.model.define import ModelDef, is_axes
from moe_jax.parallel.rules import on_mesh, spec


def mesh_fault(model: ModelDef, mesh: Mesh | AbstractMesh) -> str | None:
    """Name what the mesh cannot split: a parameter's axis or the rows of float8; None if it fits.

    The text has no full stop: the caller adds what to change.
    """
    tensor = mesh.shape["tensor"]
    if model.config.moe.matmul == "float8" and tensor > 1:
        return (
            f"config.model.moe.matmul is float8, which scales whole rows and experts, so "
            f"mesh.tensor ({tensor}) must be 1"
        )
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract)
    axes = jax.tree.leaves(model.logical_axes, is_leaf=is_axes)
    for (path, leaf), logical in zip(leaves, axes, strict=True):
        names = on_mesh(logical, leaf.shape, mesh.shape)
        for size, name, entry in zip(leaf.shape, names, tuple(spec(names)), strict=False):
            split = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            ways = 1
            for axis in split:
                ways *= mesh.shape[axis]
            if size % ways:
                where = "/".join(str(getattr(key, "key", key)) for key in path)
                return (
                    f"Parameter {where} has {name} = {size}, which mesh {' x '.join(split)} "
                    f"({ways}) does not divide"
                )
    return None
