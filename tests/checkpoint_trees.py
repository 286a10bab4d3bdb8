"""Parameter trees on several meshes, and helpers that damage files of a checkpoint."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.checkpoint import Checkpoints
from moe_jax.parallel.mesh import MeshConfig, make_mesh


class Moments(NamedTuple):
    """A stand-in for an optimizer's state."""

    mu: dict
    count: int


LAYOUTS = {
    "one": (MeshConfig(), 1),
    "data8": (MeshConfig(), 8),
    "expert8": (MeshConfig(data=1, expert=8), 8),
    "cube": (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 8),
    "expert4": (MeshConfig(data=1, expert=4), 4),
}
SPECS = {"w_in": P("expert", "fsdp", "tensor"), "scale": P(), "half": P(("data", "expert"), None)}


def make_tree(layout: str, seed: int = 0):
    """Make a tree on the mesh of `layout`; its values depend only on the seed."""
    config, devices = LAYOUTS[layout]
    mesh = make_mesh(config, jax.devices()[:devices])
    rng = np.random.default_rng(seed)
    values = {
        "w_in": rng.normal(size=(8, 4, 6)).astype(np.float32),
        "scale": rng.normal(size=(5,)).astype(np.float32),
        "half": rng.normal(size=(8, 2)).astype(jnp.bfloat16),
    }
    arrays = {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in values.items()}
    params = {"blocks": [{"w_in": arrays["w_in"]}, {"half": arrays["half"]}]}
    params["scale"] = arrays["scale"]
    moments = Moments({"scale": arrays["scale"] + 1}, 7)
    return {"params": params, "opt": (moments,), "step": np.int64(3)}


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            np.shape(x), np.asarray(x).dtype, sharding=getattr(x, "sharding", None)
        ),
        tree,
    )


def saved(root, *steps: int, keep_last: int = 9, keep_every: int = 0) -> Checkpoints:
    checkpoints = Checkpoints(root, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        assert checkpoints.save(step, make_tree("cube", seed=step))
    checkpoints.wait()
    return checkpoints


def same_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def files_of(root: pathlib.Path, step: int) -> list[pathlib.Path]:
    """The files of a step that its manifest lists, largest (weights) first."""
    files = [p for p in (root / str(step)).rglob("*") if p.is_file() and p.stat().st_size]
    listed = [p for p in files if p.name != "manifest.json"]
    return sorted(listed, key=lambda p: -p.stat().st_size)


def flip_bit(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
