"""From the config as written to the config as run: everything that depends on the machine."""

import dataclasses
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.model.define import ModelDef
from moe_jax.model.mesh_fit import mesh_fault
from moe_jax.moe.components import Components, make_components, refuse_lookahead
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch_types import LayerSizes
from moe_jax.moe.groups import TOKENS_PER_EXPERT, fewest_rows
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.train.optim import DECAY_OF, RATE_OF, OptimizerConfig


class Resolved(NamedTuple):
    """A config as it runs, and what is built from it once."""

    config: Config
    components: Components | None  # of the MoE layers; None: dense
    notes: list[str]  # for the start-up log


def resolve(config: Config, num_devices: int, tokenizer_vocab: int) -> Resolved:
    """Fill in what the config leaves open.

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
    components = None if model.dense else _checked_components(model.moe)
    moe = model.moe
    if components is not None:
        moe = _resolved_moe(config, mesh, rows, components, notes)
    model = dataclasses.replace(model, vocab_size=vocab, moe=moe)
    config = dataclasses.replace(config, mesh=mesh, model=model)
    if components is not None:
        lookahead = components.dispatch.lookahead(layer_sizes(config))
        if lookahead:
            notes.append(f"{lookahead} is not causal: a later token can evict an earlier one's")
    return Resolved(config, components, notes)


def _checked_components(moe: MoEConfig) -> Components:
    """What the config names, where a next-token model may have it."""
    components = make_components(moe)
    refuse_lookahead(components, moe)
    if moe.num_experts == 1:  # a softmax over one expert is always 1, and gshard takes two
        raise UserError(
            f"model.moe.num_experts is 1, which leaves router {moe.router} nothing to choose: "
            f"set 2 or more, or model.dense=True."
        )
    return components


def _resolved_moe(
    config: Config, mesh: MeshConfig, rows: int, components: Components, notes: list[str]
) -> MoEConfig:
    """The router's own K, and the rows of a routing group."""
    moe, choices = config.model.moe, components.router.choices
    if choices != moe.top_k:
        notes.append(f"router {moe.router} makes {choices} choices a token: top_k is {choices}")
        moe = dataclasses.replace(moe, top_k=choices)
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
    return dataclasses.replace(moe, group_rows=group_rows)


def layer_sizes(config: Config) -> LayerSizes:
    """Sizes of one MoE layer of a resolved config on one device."""
    moe, length = config.model.moe, config.data.sequence_length
    return LayerSizes(
        tokens=_rows_together(config, config.mesh) * length,
        group_tokens=moe.group_rows * length,
        choices=moe.top_k,
        experts=moe.num_experts,
        expert_shards=config.mesh.expert,
    )


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
    """The fewest rows that give enough tokens per expert; see `groups.fewest_rows`."""
    length, experts = config.data.sequence_length, config.model.moe.num_experts
    found = fewest_rows(rows, length, choices, experts)
    mean = found * length * choices / experts
    if mean < TOKENS_PER_EXPERT:
        notes.append(
            f"a routing group of {rows} rows gives {mean:.0f} tokens an expert on average, "
            f"under {TOKENS_PER_EXPERT}: expect more drops, or raise the rows a device holds"
        )
    return found


def check_shapes(model: ModelDef, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError naming what the mesh cannot split."""
    fault = mesh_fault(model, mesh)
    if fault is not None:
        raise UserError(f"{fault}: change config.mesh or the model's size.")


def _describe_global_balance(config: Config) -> list[str]:
    """How many rows `balance_scope` global stands for: microbatches are balanced one by one."""
    moe, train = config.model.moe, config.train
    if moe.balance_scope != "global" or not moe.balance_weight:
        return []
    rows = train.batch_size // train.accumulation
    line = f"balance loss: over {rows} rows at once (balance_scope global)"
    if train.accumulation == 1:
        return [line]
    return [
        f"{line}, one microbatch of the {train.batch_size} rows of a step: "
        f"train.accumulation {train.accumulation} changes it"
    ]


def _describe_factors(optimizer: OptimizerConfig) -> list[str]:
    """The groups of parameters with another learning rate or weight decay than by default."""
    said = []
    for what, peak, factors, default in (
        ("learning rate", optimizer.learning_rate, optimizer.rate_of, RATE_OF),
        ("weight decay", optimizer.weight_decay, optimizer.decay_of, DECAY_OF),
    ):
        others = {group: by for group, by in factors.items() if by != default[group]}
        if others:
            each = (
                f"{group} {peak * by:g} ({by:g} times {peak:g})" for group, by in others.items()
            )
            said.append(f"{what} by group: {', '.join(each)}")
    return said


def describe(config: Config, components: Components | None) -> list[str]:
    """Start-up lines: what the optimizer does by group, routing groups, capacity in tokens."""
    model, moe = config.model, config.model.moe
    factors = _describe_factors(config.optimizer)
    if components is None:
        return ["dense model: no experts", *factors]
    tokens = moe.group_rows * config.data.sequence_length
    train, evaluate = (
        components.dispatch.capacity(tokens, moe.top_k, moe.num_experts, train)
        for train in (True, False)
    )
    lines = [
        f"{model.moe_layers} of {model.num_layers} layers hold {moe.num_experts} experts, "
        f"top-{moe.top_k}, router {moe.router}, dispatch {moe.dispatch}",
        f"routing group: {moe.group_rows} rows = {tokens} tokens",
        *_describe_global_balance(config),
        *factors,
    ]
    if train is None:
        return [*lines, "capacity: unbounded"]
    mean = tokens * moe.top_k / moe.num_experts
    return [
        *lines,
        f"capacity: {train} tokens an expert and group in training, {evaluate} in evaluation "
        f"({mean:g} at an even load), priority {moe.priority}",
    ]
