"""From the config as written to the config as run: everything that depends on the machine."""

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.model.define import ModelDef
from moe_jax.model.mesh_fit import mesh_fault
from moe_jax.moe.components import make_dispatch, make_router, refuse_lookahead
from moe_jax.parallel.mesh import MeshConfig

TOKENS_PER_EXPERT = 64  # of a routing group, on average: fewer make the drop rate jump


def resolve(config: Config, num_devices: int, tokenizer_vocab: int) -> tuple[Config, list[str]]:
    """Fill in what the config leaves open; returns it with notes for the start-up log.

    Args:
      config: as written.
      num_devices: over all processes.
      tokenizer_vocab: token ids of the data are below it.

    Raises:
      UserError: sizes that do not fit the devices, the batch or the vocabulary.
    """
    mesh = config.mesh.resolve(num_devices)
    model, notes = config.model, []
    vocab = model.vocab_size or tokenizer_vocab
    if tokenizer_vocab > vocab:
        raise UserError(
            f"The tokenizer has token ids up to {tokenizer_vocab - 1}, beyond model.vocab_size "
            f"({vocab}): set model.vocab_size to {tokenizer_vocab} or more."
        )
    rows = _rows_together(config, mesh)
    moe = model.moe
    if not model.dense:
        refuse_lookahead(moe)
        if moe.num_experts == 1:  # a softmax over one expert is always 1, and gshard takes two
            raise UserError(
                f"model.moe.num_experts is 1, which leaves router {moe.router} nothing to choose: "
                f"set 2 or more, or model.dense=True."
            )
        choices = make_router(moe).choices
        if choices != moe.top_k:
            notes.append(f"router {moe.router} makes {choices} choices a token: top_k is {choices}")
            moe = dataclasses.replace(moe, top_k=choices)
        make_dispatch(moe)
        if moe.num_experts % mesh.expert:
            raise UserError(
                f"model.moe.num_experts ({moe.num_experts}) is not divisible by mesh.expert "
                f"({mesh.expert}): change one of them."
            )
        group_rows = moe.group_rows or _group_rows(config, rows, moe.top_k, notes)
        if rows % group_rows:
            raise UserError(
                f"model.moe.group_rows ({group_rows}) does not divide the {rows} rows that one "
                f"device holds in a microbatch, so the mesh or train.accumulation would split a "
                f"routing group: let train.batch_size / (train.accumulation x mesh data x fsdp x "
                f"expert) be a multiple of {group_rows} (a run that has begun keeps its groups)."
            )
        moe = dataclasses.replace(moe, group_rows=group_rows)
        if moe.priority == "choice" and moe.top_k > 1 and moe.dispatch in ("capacity", "einsum"):
            notes.append("priority choice is not causal: a later token can evict an earlier one's")
    model = dataclasses.replace(model, vocab_size=vocab, moe=moe)
    return dataclasses.replace(config, mesh=mesh, model=model), notes


def _rows_together(config: Config, mesh: MeshConfig) -> int:
    """Rows of a microbatch that one device holds."""
    parts = config.train.accumulation * mesh.batch_shards
    if config.train.batch_size % parts:
        raise UserError(
            f"train.batch_size ({config.train.batch_size}) is not divisible by train.accumulation "
            f"x mesh data x fsdp x expert ({parts}): change one of them."
        )
    return config.train.batch_size // parts


def _group_rows(config: Config, rows: int, choices: int, notes: list[str]) -> int:
    """The fewest rows that give TOKENS_PER_EXPERT on average and that divide `rows`."""
    per_row = config.data.sequence_length * choices / config.model.moe.num_experts
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    for n in (*small, *(rows // n for n in reversed(small))):
        if n * per_row >= TOKENS_PER_EXPERT:
            return n
    notes.append(
        f"a routing group of {rows} rows gives {rows * per_row:.0f} tokens an expert on average, "
        f"under {TOKENS_PER_EXPERT}: expect more drops, or raise the rows a device holds"
    )
    return rows


def check_shapes(model: ModelDef, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError naming what the mesh cannot split."""
    fault = mesh_fault(model, mesh)
    if fault is not None:
        raise UserError(f"{fault}: change config.mesh or the model's size.")


def describe(config: Config) -> list[str]:
    """Start-up lines: routing groups and the capacity in tokens."""
    model, moe = config.model, config.model.moe
    if model.dense:
        return ["dense model: no experts"]
    tokens = moe.group_rows * config.data.sequence_length
    dispatch = make_dispatch(moe)
    train, evaluate = (
        dispatch.capacity(tokens, moe.top_k, moe.num_experts, train) for train in (True, False)
    )
    lines = [
        f"{model.moe_layers} of {model.num_layers} layers hold {moe.num_experts} experts, "
        f"top-{moe.top_k}, router {moe.router}, dispatch {moe.dispatch}",
        f"routing group: {moe.group_rows} rows = {tokens} tokens",
    ]
    if train is None:
        return [*lines, "capacity: unbounded"]
    mean = tokens * moe.top_k / moe.num_experts
    return [
        *lines,
        f"capacity: {train} tokens an expert and group in training, {evaluate} in evaluation "
        f"({mean:g} at an even load), priority {moe.priority}",
    ]
