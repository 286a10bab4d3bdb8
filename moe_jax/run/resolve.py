"""Resolves a config: fills in what depends on the devices, and describes it in start-up lines.

K assignments per token, E experts, S tokens per routing group.
"""

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
    """A resolved config and what is built from it once."""

    config: Config
    components: Components | None  # of the MoE layers; None: dense model
    notes: list[str]  # for the start-up log


def resolve(config: Config, num_devices: int, tokenizer_vocab: int) -> Resolved:
    """Fill in the values that the config leaves open.

    Args:
      config: as written.
      num_devices: of all processes.
      tokenizer_vocab: vocabulary size of the tokenizer; token ids are below it.

    Raises:
      UserError: sizes do not fit the devices, the batch or the vocabulary.
    """
    mesh = config.mesh.resolve(num_devices)
    model, notes = config.model, []
    vocab = model.vocab_size or tokenizer_vocab
    if tokenizer_vocab > vocab:
        raise UserError(
            f"config.model.vocab_size is {vocab}: the tokenizer has {tokenizer_vocab} token ids. "
            f"Set {tokenizer_vocab} or more."
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
            notes.append(
                f"{lookahead} is not causal: assignments of later tokens can displace those of "
                f"earlier tokens"
            )
    return Resolved(config, components, notes)


def _checked_components(moe: MoEConfig) -> Components:
    """Make the router and dispatch path of the config, if a next-token model can use them."""
    components = make_components(moe)
    refuse_lookahead(components, moe)
    if moe.num_experts == 1:  # a softmax over one expert is always 1, and gshard needs two experts
        raise UserError(
            f"config.model.moe.num_experts is 1: router {moe.router} needs at least 2 to choose "
            f"from. Set 2 or more, or set model.dense=True."
        )
    return components


def _resolved_moe(
    config: Config, mesh: MeshConfig, rows: int, components: Components, notes: list[str]
) -> MoEConfig:
    """Resolve K, which a router may fix, and the rows per routing group."""
    moe, choices = config.model.moe, components.router.choices_per_token
    if choices != moe.top_k:
        notes.append(f"top_k: set to {choices}, because router {moe.router} fixes it")
        moe = dataclasses.replace(moe, top_k=choices)
    if moe.num_experts % mesh.expert:
        raise UserError(
            f"config.model.moe.num_experts ({moe.num_experts}) is not divisible by mesh.expert "
            f"({mesh.expert}). Set one to fit the other."
        )
    group_rows = moe.group_rows or _group_rows(config, rows, moe.top_k, notes)
    if rows % group_rows:
        raise UserError(
            f"config.model.moe.group_rows ({group_rows}) does not divide the {rows} rows per "
            f"device of a microbatch, and a routing group must not be split. Make "
            f"train.batch_size / (train.accumulation x mesh data x fsdp x expert) a multiple of "
            f"{group_rows} (a resumed run keeps its group_rows)."
        )
    return dataclasses.replace(moe, group_rows=group_rows)


def layer_sizes(config: Config) -> LayerSizes:
    """The sizes of one MoE layer of a resolved config on one device."""
    moe, length = config.model.moe, config.data.sequence_length
    return LayerSizes(
        tokens=_rows_together(config, config.mesh) * length,
        group_tokens=moe.group_rows * length,
        choices=moe.top_k,
        experts=moe.num_experts,
        expert_shards=config.mesh.expert,
    )


def _rows_together(config: Config, mesh: MeshConfig) -> int:
    """Compute the rows per device of a microbatch."""
    parts = config.train.accumulation * mesh.batch_shards
    if config.train.batch_size % parts:
        raise UserError(
            f"config.train.batch_size ({config.train.batch_size}) is not divisible by "
            f"train.accumulation x mesh data x fsdp x expert ({parts}). Set a multiple of {parts}."
        )
    return config.train.batch_size // parts


def _group_rows(config: Config, rows: int, choices: int, notes: list[str]) -> int:
    """Choose the fewest rows that give enough assignments per expert (`groups.fewest_rows`)."""
    length, experts = config.data.sequence_length, config.model.moe.num_experts
    found = fewest_rows(rows, length, choices, experts)
    mean = found * length * choices / experts
    if mean < TOKENS_PER_EXPERT:
        notes.append(
            f"routing group of {rows} rows: {mean:.0f} assignments per expert at balanced load, "
            f"below {TOKENS_PER_EXPERT}, so more are dropped; more rows per device would help"
        )
    return found


def check_shapes(model: ModelDef, mesh: Mesh | AbstractMesh) -> None:
    """Check that the mesh can split all parameters of the model.

    Raises:
      UserError: names the axis that the mesh cannot split.
    """
    fault = mesh_fault(model, mesh)
    if fault is not None:
        raise UserError(f"{fault}. Change config.mesh or the model's size.")


def _describe_unbalanced(moe: MoEConfig, components: Components) -> list[str]:
    """The line about settings with which nothing spreads the load over the experts."""
    if not components.router.balanced_by_loss or (moe.balance_weight and not moe.freeze_router):
        return []
    why = (
        "model.moe.freeze_router is True" if moe.freeze_router else "model.moe.balance_weight is 0"
    )
    return [
        f"nothing balances the load of router {moe.router}: {why}. Some experts will get most "
        f"tokens; set model.moe.balance_weight 0.01, or router sigmoid_bias."
    ]


def _describe_global_balance(config: Config) -> list[str]:
    """The rows that `balance_scope` global covers: those of one microbatch."""
    moe, train = config.model.moe, config.train
    if moe.balance_scope != "global" or not moe.balance_weight:
        return []
    rows = train.batch_size // train.accumulation
    line = f"balance loss: over {rows} rows (balance_scope global)"
    if train.accumulation == 1:
        return [line]
    return [
        f"{line}, one of the {train.accumulation} microbatches of {train.batch_size} rows per "
        f"step: train.accumulation changes the loss"
    ]


def _describe_factors(optimizer: OptimizerConfig) -> list[str]:
    """The groups of parameters whose learning rate or weight decay is not the default."""
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
    """The start-up lines about experts, routing groups, capacity and per-group optimizer values."""
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
        f"MoE: {model.moe_layers} of {model.num_layers} layers, {moe.num_experts} experts per "
        f"layer, top-{moe.top_k}, router {moe.router}, dispatch {moe.dispatch}",
        f"routing group: {moe.group_rows} rows = {tokens} tokens",
        *_describe_unbalanced(moe, components),
        *_describe_global_balance(config),
        *factors,
    ]
    if train is None:
        return [*lines, "capacity: unbounded"]
    mean = tokens * moe.top_k / moe.num_experts
    return [
        *lines,
        f"capacity: {train} slots per expert per routing group in training, {evaluate} in "
        f"evaluation (balanced load: {mean:g}), priority {moe.priority}",
    ]
