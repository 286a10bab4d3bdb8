"""Checks the initial parameters: their scale, their loss and activations, and their drops.

E experts, D width, F expert width, U matrices into an expert, L layers, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Config
from moe_jax.model.block import Block
from moe_jax.moe.components import Components
from moe_jax.moe.types import MoEContext
from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.subject import Subject, by_layer, reduce_leaves
from moe_jax.tools.doctor.walk import walk_blocks
from moe_jax.train.state import replicated

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
    """The rms after each block on the first microbatch, in evaluation mode."""

    def measure(block: Block, context: MoEContext, run: Callable[[], jax.Array]):
        x = run()
        return x, jnp.sqrt((x.astype(jnp.float32) ** 2).mean())

    return [float(rms) for rms in walk_blocks(subject, measure, train=False)]


def capacity(subject: Subject) -> Finding:
    """Report the slots per expert and routing group, and check the share dropped at init."""
    if not subject.moe_layers:
        return NO_EXPERTS
    parts = subject.run.model.components
    assert parts is not None  # the model has MoE layers
    asked, run = (_slots(of.config, parts) for of in (subject.plan, subject.run))
    moe = subject.probe.moe
    assert moe is not None
    outcomes, stats = moe.stats.outcomes, moe.stats
    dropped = outcomes.dropped_capacity + outcomes.dropped_buffer
    share_L = dropped / np.maximum(outcomes.sampled(), 1)
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
