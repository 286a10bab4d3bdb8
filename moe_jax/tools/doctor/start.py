"""Checks the initial parameters: their scale, their loss and activations, and their drops.

E experts, D width, F expert width, U matrices into an expert, L layers, V vocabulary.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import Config
from moe_jax.model.forward import batch_context
from moe_jax.model.layout import to_layers
from moe_jax.model.rope import rope_tables
from moe_jax.moe.components import Components
from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.subject import Subject, by_layer, reduce_leaves
from moe_jax.train.state import replicated
from moe_jax.train.step import step_keys

SIGMAS = 5  # tolerance, in standard errors of the estimated standard deviation
LOSS_TOLERANCE = 1.0  # nats
MOST_GROWTH, LEAST_SCALE = 10.0, 0.01
MOST_DROPPED = 0.5

NO_EXPERTS = Finding(True, "dense model: no experts")


def expert_init(subject: Subject) -> Finding:
    """Compare the std of each expert with 1 / sqrt(fan-in), for w_out with 1 / sqrt(2 L fan-in).

    Both are multiplied by `model.moe.expert_init_scale`.

    The std of a sample of n numbers has a relative standard error of 1 / sqrt(2 n).
    """
    if not subject.moe_layers:
        return NO_EXPERTS
    run = subject.run
    config, params = run.model.config, subject.state().params
    std = jax.jit(
        lambda p: reduce_leaves(run.model, p, lambda leaf, axes: leaf.std(axes)),
        out_shardings=replicated(run.mesh),
    )
    D, F, scale = config.width, config.moe.expert_width, config.moe.expert_init_scale
    targets = {
        "w_in_EDUF": (scale / math.sqrt(D), D * F),
        "w_out_EFD": (scale / math.sqrt(F * 2 * config.num_layers), D * F),
    }
    worst = (0.0, 1.0, "", 0.0)  # deviations over the tolerance, ratio, where, tolerance
    for name, found_E in by_layer(run.model, jax.device_get(std(params))).items():
        leaf = name.rsplit("/", 1)[-1]
        if leaf not in targets or found_E.ndim != 1:
            continue
        target, size = targets[leaf]
        tolerance = SIGMAS / math.sqrt(2 * size)
        expert = int(np.abs(found_E / target - 1).argmax())
        ratio = float(found_E[expert] / target)
        off = abs(ratio - 1) / tolerance
        if not off <= worst[0]:
            worst = (off, ratio, f"{leaf} of expert {expert} in layer {layer_of(name)}", tolerance)
    return Finding(
        worst[0] <= 1,
        f"worst ratio to target {worst[1]:.4f} ({worst[2]}), within {worst[3]:.1%}",
        "Initialise expert weights with the fan-in of one expert, not of all experts together.",
    )


def layer_of(name: str) -> str:
    """The layer in a parameter name: `3` for `blocks/3/ffn/w_in_EDUF`."""
    return name.split("/")[1]


def first_loss(subject: Subject) -> Finding:
    """Compare the initial loss with log V.

    Logits of unit variance add 0.5 nats; the rest of the tolerance is for the noise of a small
    batch.
    """
    loss, uniform = subject.probe.loss, math.log(subject.run.config.model.vocab_size)
    return Finding(
        abs(loss - uniform) <= LOSS_TOLERANCE,
        f"{loss:.3f} against {uniform:.3f} nats, within {LOSS_TOLERANCE:g}",
        "Initialise the output head (or the tied embedding) with variance 1 / width, and "
        "check that targets are the next tokens.",
    )


def activations(subject: Subject) -> Finding:
    """Check the root mean square of the residual stream after each block, in evaluation mode."""
    rms = residual_scale(subject)
    growth = max((b / a for a, b in itertools.pairwise(rms)), default=1.0)
    ok = bool(np.isfinite(rms).all()) and growth <= MOST_GROWTH and min(rms) >= LEAST_SCALE
    shown = rms if len(rms) <= 6 else [*rms[:3], *rms[-3:]]
    return Finding(
        ok,
        f"rms {', '.join(f'{x:.3g}' for x in shown)} (first to last layer), grows at most "
        f"{growth:.2f}x per layer",
        f"Scale the output of each block by 1 / sqrt(2 L): rms must stay above "
        f"{LEAST_SCALE:g} and grow less than {MOST_GROWTH:g}x per layer.",
    )


def residual_scale(subject: Subject) -> list[float]:
    """The rms after each block on the first microbatch; each kind of block is compiled once."""
    run, state = subject.run, subject.state()
    model, config = run.model, run.model.config
    batch = jax.tree.map(lambda leaf: leaf[0], subject.batch)
    keys_B = step_keys(run.config.seed, jnp.int32(0), batch.row_B)
    context = batch_context(batch, keys_B, run.mesh, False, {}, run.step_options.num_sources)
    rope = rope_tables(batch.positions_BT, config.head_dim, config.rope_theta, model.dtype)
    segments = batch.segments_BT if config.confine_attention else None

    def block_of(layer: int) -> Any:
        def block(params: Any, router: Any, x: jax.Array):
            here = dataclasses.replace(context, router_state=router)
            x, _ = nnx.merge(model.blocks[layer], params)(x, rope, segments, here)
            return x, jnp.sqrt((x.astype(jnp.float32) ** 2).mean())

        return jax.jit(block)

    compiled: dict[bool, Any] = {}
    x = state.params["embed_VD"].astype(model.dtype)[batch.tokens_BT]
    blocks, found, moe_layer = to_layers(state.params, model.layout)["blocks"], [], 0
    for layer in range(config.num_layers):
        is_moe = config.is_moe(layer)
        block = compiled.setdefault(is_moe, None) or block_of(layer)
        compiled[is_moe] = block
        router = {k: v[moe_layer] for k, v in state.router.items()} if is_moe else {}
        moe_layer += is_moe
        x, rms = block(blocks[str(layer)], router, x)
        found.append(float(rms))
    return found


def capacity(subject: Subject) -> Finding:
    """Report the slots per expert and routing group, and check the share dropped at init."""
    if not subject.moe_layers:
        return NO_EXPERTS
    parts = subject.run.model.components
    assert parts is not None  # the model has MoE layers
    asked, run = (_slots(of.config, parts) for of in (subject.plan, subject.run))
    moe = subject.probe.moe
    assert moe is not None
    fates, stats = moe.stats.fates, moe.stats
    dropped = fates.dropped_capacity + fates.dropped_buffer
    share_L = dropped / np.maximum(fates.sampled(), 1)
    worst = int(np.argmax(share_L))
    figure = f"{asked}; at init {share_L[worst]:.1%} dropped"
    figure += f" (worst: layer {subject.moe_layers[worst]})"
    if run != asked:
        figure += f" of a shrunk group ({run})"
    if not np.all(stats.conserved()):
        return Finding(False, figure, "Count every assignment once: the ledger misses some.")
    return Finding(
        bool(share_L[worst] <= MOST_DROPPED),
        figure,
        "Raise model.moe.capacity_factor or model.moe.group_rows (or recv_factor of dropless): "
        f"more than {MOST_DROPPED:.0%} of the assignments are dropped.",
    )


def _slots(config: Config, components: Components) -> str:
    moe = config.model.moe
    tokens = moe.group_rows * config.data.sequence_length
    train, evaluate = (
        components.dispatch.capacity(tokens, moe.top_k, moe.num_experts, train)
        for train in (True, False)
    )
    if train is None:
        return "unbounded in train and eval"
    return f"{train:,} slots per expert in train, {evaluate:,} in eval, for {tokens:,} tokens"
