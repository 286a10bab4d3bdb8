"""Shrinks a config so that it runs on a CPU and still uses the same code paths.

It keeps router, dispatch path, experts per token, activation, norms, tied head, the period of MoE
layers, scopes, capacity factors, remat, scanning, dtype and optimizer.  It caps the sizes.
"""

import dataclasses
import math
from typing import Any

from moe_jax.config import Config, to_flat_dict
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.data.tokenizers import config_tokenizer
from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.moe.components import make_router
from moe_jax.moe.config import MoEConfig
from moe_jax.parallel.mesh import MeshConfig

DEVICES = 8  # most virtual devices, unless --devices sets more
WIDTH, FFN_WIDTH, HEAD_DIM, VOCABULARY, LENGTH, ROWS = 64, 128, 16, 2048, 64, 16
SMALL_TEXT, TEXT = 16 * 2**20, 256 * 2**20  # most bytes to tokenise: shrunk run, real run


def named_devices(mesh: MeshConfig) -> int:
    """The product of the mesh sizes in the config, where -1 counts as 1."""
    return math.prod(abs(size) for size in dataclasses.astuple(mesh))


def shrink_mesh(mesh: MeshConfig) -> MeshConfig:
    """Halve the largest axis until DEVICES suffice; an axis of -1 takes the remaining devices."""
    sizes = dataclasses.asdict(mesh)
    while math.prod(abs(size) for size in sizes.values()) > DEVICES:
        largest = max(sizes, key=lambda name: sizes[name])
        sizes[largest] = max(1, sizes[largest] // 2)
    return MeshConfig(**sizes)


def shrink(config: Config, mesh: MeshConfig) -> Config:
    """Cap the sizes of `config` for `mesh`, which is resolved and divides the config's sizes."""
    train, shards = config.train, mesh.batch_shards
    accumulation = min(train.accumulation, 2)
    group_rows = min(config.model.moe.group_rows, 2)
    rows = min(
        train.batch_size // (train.accumulation * shards), max(2, ROWS // (accumulation * shards))
    )
    rows -= rows % max(group_rows, 1)
    vocabulary = config_tokenizer(config.data).vocab_size
    model = _shrink_model(config.model, mesh, vocabulary)
    moe = dataclasses.replace(model.moe, group_rows=group_rows)
    length = min(config.data.sequence_length, LENGTH)
    return dataclasses.replace(
        config,
        mesh=mesh,
        model=dataclasses.replace(model, moe=moe),
        data=dataclasses.replace(limit_text(config.data, SMALL_TEXT), sequence_length=length),
        train=dataclasses.replace(
            train, batch_size=accumulation * shards * max(rows, 1), accumulation=accumulation
        ),
    )


def _shrink_model(model: ModelConfig, mesh: MeshConfig, vocabulary: int) -> ModelConfig:
    tensor = mesh.tensor
    kv_heads = _cap(model.num_kv_heads, 2, tensor)
    width = _cap(model.width, WIDTH, mesh.fsdp)
    # Two periods, so that scanned layers are still scanned.
    layers = 2 if model.dense else model.moe.first_dense + 2 * model.moe.every
    moe = model.moe
    if not model.dense:
        moe = dataclasses.replace(
            moe,
            num_experts=_experts(moe, mesh.expert),
            expert_width=_cap(moe.expert_width, WIDTH, tensor),
        )
    return dataclasses.replace(
        model,
        vocab_size=max(_cap(model.vocab_size, VOCABULARY, tensor), vocabulary)
        if model.vocab_size
        else 0,
        num_layers=min(model.num_layers, layers),
        width=width,
        num_heads=kv_heads * min(model.num_heads // model.num_kv_heads, 2),
        num_kv_heads=kv_heads,
        head_dim=min(model.head_dim, HEAD_DIM),
        ffn_width=_cap(model.ffn_width, FFN_WIDTH, tensor),
        attention="auto",
        moe=moe,
    )


def _cap(value: int, most: int, multiple: int) -> int:
    """The smaller of `value` and the smallest multiple of `multiple` that is at least `most`."""
    return min(value, math.ceil(most / multiple) * multiple)


def _experts(moe: MoEConfig, shards: int) -> int:
    """The fewest experts, at least 2K and 8, that the mesh divides and the router accepts."""
    least = math.ceil(max(2 * moe.top_k, 8) / shards) * shards
    for experts in range(least, moe.num_experts, shards):
        try:
            make_router(dataclasses.replace(moe, num_experts=experts))
        except UserError:  # the router needs more, or a multiple of its expert groups
            continue
        return experts
    return moe.num_experts


def limit_text(data: DataConfig, most: int) -> DataConfig:
    """The config's own data, or `stdlib` if it is missing or larger than `most` bytes."""
    try:
        streams = find_streams(data)
        files = [f for stream in streams for f in (*stream.files, *stream.heldout_files)]
        if [stream.kind for stream in streams] == ["stdlib"]:
            return data
        if sum(file.path.stat().length for file in files) <= most:
            return data
    except (UserError, OSError):
        pass
    own = {"source": "stdlib", "files": "", "field": "text", "heldout_files": "", "mixture": {}}
    return dataclasses.replace(data, **own, store="")


def without_warmup(config: Config) -> Config:
    """Set the learning rate to its peak, because the first step of a warm-up changes nothing."""
    optimizer = dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0)
    return dataclasses.replace(config, optimizer=optimizer)


def changes(old: Config, new: Config) -> list[str]:
    """List each key that differs, as `model.width 4096 -> 64`."""
    before, after = to_flat_dict(old), to_flat_dict(new)
    keys = [key for key in after if before.get(key) != after[key]]
    keys += [key for key in before if key not in after]
    return [f"{key} {_text(before.get(key))} -> {_text(after.get(key))}" for key in keys]


def _text(value: Any) -> str:
    return "''" if value in ("", None) else str(value)
