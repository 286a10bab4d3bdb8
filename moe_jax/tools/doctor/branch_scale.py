"""Checks the scale of each MoE layer's output at initialisation against its dense twin's.

The twin is a dense FFN of the same active width with the project's dense initialisation, on the
same input.  With one fan-in rule for all, the output of a dense FFN has the variance of an
expert's, whatever its width.  K independent experts with weights w_k therefore give a ratio of
sqrt(sum of w_k^2), which is at least 1 / sqrt(K) if the weights sum to 1.

B rows, T positions, D width, E experts, K assignments per token, N tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import Config
from moe_jax.model.block import Block
from moe_jax.moe.study import study_router
from moe_jax.moe.types import MoEContext, Router, token_choice
from moe_jax.nn.ffn import DenseFFN
from moe_jax.tools.doctor.finding import Finding, name_layers
from moe_jax.tools.doctor.start import NO_EXPERTS
from moe_jax.tools.doctor.subject import Subject
from moe_jax.tools.doctor.walk import walk_blocks

# The smallest accepted ratio is LEAST_SHARE / sqrt(K); 1 / sqrt(K) is the minimum for weights that
# sum to 1.  A smaller ratio means weights that sum to less than about 1/2 (probabilities over all
# experts), or that most assignments are dropped.
LEAST_SHARE = 0.5
# DeepSeek-V3 (weights that sum to 2.5, K = 8, a shared expert) has 1.3; K = 8 experts that are
# summed without weights have 2.8.
MOST_RATIO = 2.0
TOKENS = 1024  # random tokens from which the ratio of the config as written is predicted


class Expected(NamedTuple):
    """The ratio that the router's weights give independent experts."""

    ratio: float
    weight_sum: float  # mean over tokens of the sum of a token's weights


def branch_scale(subject: Subject) -> Finding:
    """Check the rms of each MoE layer's output over its dense twin's.

    A shrunk run has fewer experts and a smaller width, so the ratio of the config as written is
    predicted from its router.
    """
    if not subject.moe_layers:
        return NO_EXPERTS
    parts = subject.plan.model.components
    assert parts is not None  # the model has MoE layers
    ratios = dict(zip(subject.moe_layers, measured_ratios(subject), strict=True))
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    written = expected_ratio(subject.plan.config, parts.router)
    least = LEAST_SHARE / math.sqrt(parts.router.choices_per_token)
    figure = f"ratio of rms {ratios[low]:.2g} (layer {low}) to {ratios[high]:.2g} (layer {high})"
    figure += f", within {least:.2g} to {MOST_RATIO:g}"
    if subject.shrunk:
        figure += f"; {written.ratio:.2g} expected of the config as written"
    bad = [layer for layer, ratio in ratios.items() if not least <= ratio <= MOST_RATIO]
    explained = not least <= written.ratio <= MOST_RATIO
    if not bad and not explained:
        return Finding(True, figure)
    if not bad or (subject.shrunk and explained):
        where, ratio = "In the config as written", written.ratio
    else:
        where, ratio = f"In {name_layers(bad, len(ratios))}", ratios[bad[0]]
    what = _advice(subject, written, ratio) if explained else _UNEXPLAINED.format(ratio=ratio)
    return Finding(True, figure, f"{where} the MoE output is {what}", warns=True)


_UNEXPLAINED = (
    "{ratio:.2g} times its dense twin's, and the router's weights do not explain it: see the "
    "checks of expert init and of drops."
)


def _advice(subject: Subject, written: Expected, ratio: float) -> str:
    """Complete the sentence for weights whose sum is far from 1."""
    moe, parts = subject.plan.config.model.moe, subject.plan.model.components
    assert parts is not None  # the model has MoE layers
    router, options = parts.router, f"model.moe.options.{moe.router}"
    why = f"the weights of a token sum to {written.weight_sum:.2g} at init"
    if ratio > 1:
        knob = f"{options}.routed_scale" if hasattr(router, "routed_scale") else "the weights"
        return f"{ratio:.2g} times its dense twin's: {why}. Lower {knob}."
    if router.choices_per_token > 1 and hasattr(router, "renormalize"):
        change = f"set {options}.renormalize=True"
    else:
        change = "use router top_k with model.moe.top_k=2 or more, whose weights sum to 1"
    return (
        f"{1 / ratio:.2g} times smaller than its dense twin's: {why} (1 / E is "
        f"{1 / moe.num_experts:.2g}). Keep it if the paper does this (Switch, OLMoE); to start at "
        f"the twin's scale, {change}."
    )


def measured_ratios(subject: Subject) -> list[float]:
    """The ratio of each MoE layer on the first microbatch, in training mode, on real tokens."""
    config, dtype = subject.run.model.config, subject.run.model.dtype
    parts, key = subject.run.model.components, jax.random.key(0, impl="threefry2x32")
    assert parts is not None  # the model has MoE layers
    active = parts.router.choices_per_token + config.moe.shared_experts

    def measure(block: Block, context: MoEContext, run: Callable[[], jax.Array]):
        layer = block.ffn
        if isinstance(layer, DenseFFN):
            return run(), jnp.nan
        seen: list[jax.Array] = []

        def recorded(x_BTD: jax.Array, context: MoEContext):
            out_BTD, aux = layer(x_BTD, context)
            seen.extend((x_BTD, out_BTD))
            return out_BTD, aux

        block.ffn = recorded  # pyright: ignore[reportAttributeAccessIssue]
        stream_BTD = run()
        x_BTD, out_BTD = seen
        twin = DenseFFN(
            config.width,
            active * config.moe.expert_width,
            activation=config.activation,
            depth=config.num_layers,
            dtype=dtype,
            rngs=nnx.Rngs(params=key),
        )
        mask_BT = context.mask_BT
        return stream_BTD, _rms(out_BTD, mask_BT) / _rms(twin(x_BTD), mask_BT)

    ratios = walk_blocks(subject, measure, train=True)
    return [float(ratios[layer]) for layer in subject.moe_layers]


def _rms(x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    x_BTD = jnp.where(mask_BT[..., None], x_BTD.astype(jnp.float32), 0)
    return jnp.sqrt((x_BTD**2).sum() / (mask_BT.sum() * x_BTD.shape[-1]))


def expected_ratio(config: Config, router: Router) -> Expected:
    """Route random tokens of unit rms and predict the ratio from their weights, without drops.

    Shared experts add the variance of one dense FFN.
    """
    moe, model = config.model.moe, config.model
    draw = np.random.default_rng(0)
    x_BTD = jnp.asarray(draw.normal(size=(1, TOKENS, model.width)), jnp.float32)
    ids_BT = jnp.asarray(draw.integers(model.vocab_size, size=(1, TOKENS)), jnp.int32)

    @jax.jit
    def weights_of(x_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        study = study_router(
            router, x_BTD, num_experts=moe.num_experts, token_ids_BT=ids_BT, deterministic=False
        )
        choice, _ = token_choice(study.choice, TOKENS)
        return jnp.where(choice.valid_GSK, choice.weights_GSK, 0)[0]

    weights_NK = np.asarray(weights_of(x_BTD, ids_BT), np.float64)
    variance = (weights_NK**2).sum(1).mean() + (moe.shared_experts > 0)
    return Expected(math.sqrt(variance), float(weights_NK.sum(1).mean()))
