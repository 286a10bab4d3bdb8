"""Checks the balance loss's gradient to each router beside the language model's.

E experts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.batch import Batch
from moe_jax.tools.doctor.finding import Finding, name_layers
from moe_jax.tools.doctor.start import NO_EXPERTS, layer_of
from moe_jax.tools.doctor.subject import Subject, by_layer, leaf_norm, reduce_leaves
from moe_jax.train.state import replicated
from moe_jax.train.step import make_gradients

# Shrunk configs/tiny.py (E = 8, K = 2), effective experts of layers 0 and 1 after 30 steps (100):
#   balance weight | ratio     | effective experts
#   0              | 0         | 3.6, 2.5
#   0.01           | 0.03-0.05 | 4.8, 4.0 (6.1, 5.7)
#   0.1            | 0.3-0.5   | 7.7, 6.2
#   1              | 3-5       | 7.8, 7.9
# The loss after 100 steps is the same with 0.01, 0.1 and 1, so a ratio of 3 to 5 does not dominate.
# A ratio of 0.001 to 0.002 (shrunk configs/qwen3_30b_a3b.py) spreads no load: in the worst layer
# 10.3 of 16 experts are effective after 40 steps, and 10.2 without a balance loss.
LEAST_PULL = 0.005
MOST_PULL = 10.0
GOOD_PULL = 0.1  # the balance weight that the advice names has about this ratio


def balance_pull(subject: Subject) -> Finding:
    """Check the norm of the weighted balance loss's gradient over the language model's."""
    if not subject.moe_layers:
        return NO_EXPERTS
    moe, parts = subject.config.model.moe, subject.run.model.components
    assert parts is not None  # the model has MoE layers
    if not subject.router_parameters:
        return Finding(True, f"router {moe.router} has no parameters")
    if moe.freeze_router:
        return Finding(True, "frozen: model.moe.freeze_router is True (0 gradients are used)")
    pulls = pull_at_weight_one(subject)
    if not any(pulls.values()):
        return Finding(True, f"0: the balance loss of router {moe.router} has no gradient")
    keeps_state = bool(parts.router.state_specs(moe.num_experts))
    return judge_pulls(pulls, moe.balance_weight, keeps_state)


def judge_pulls(pulls: dict[int, float], weight: float, keeps_state: bool) -> Finding:
    """Compare the ratios with the limits.

    Args:
      pulls: MoE layer -> ratio of norms at a balance weight of 1; the gradient is linear in it.
      weight: model.moe.balance_weight.
      keeps_state: True: the router also balances by its state, as sigmoid_bias does.
    """
    low, high = min(pulls, key=pulls.__getitem__), max(pulls, key=pulls.__getitem__)
    figure = (
        f"{weight * pulls[low]:.2g} (layer {low}) to {weight * pulls[high]:.2g} (layer {high}) of "
        f"the language model's at balance_weight {weight:g}"
    )
    weak = [layer for layer, pull in pulls.items() if weight * pull < LEAST_PULL]
    strong = [layer for layer, pull in pulls.items() if weight * pull > MOST_PULL]
    logs = [math.log(pull) for pull in pulls.values() if 0 < pull < math.inf]
    good = f"{GOOD_PULL / math.exp(np.mean(logs)):.1g}" if logs else "0.01"
    if strong:
        return Finding(
            True,
            figure,
            f"In {name_layers(strong, len(pulls))} the router learns from the balance loss rather "
            f"than from the language model: lower model.moe.balance_weight to about {good}.",
            warns=True,
        )
    if weak and not keeps_state:
        return Finding(
            True,
            figure,
            f"In {name_layers(weak, len(pulls))} the balance loss is "
            f"{'too weak at init to spread the load' if weight else 'off'}: raise "
            f"model.moe.balance_weight to about {good}, use router sigmoid_bias, or see with "
            f"--steps=30 whether a layer collapses.",
            warns=True,
        )
    if keeps_state:
        figure += "; the router's bias balances the load"
    return Finding(True, figure)


def pull_at_weight_one(subject: Subject) -> dict[int, float]:
    """The ratio of gradient norms per MoE layer, with a balance weight of 1, at the first batch."""
    model, run = subject.run.model, subject.run
    moe = dataclasses.replace(model.config.moe, balance_weight=1.0, z_weight=0.0)
    config = dataclasses.replace(model.config, logits_z_weight=0.0, moe=moe)
    only = dataclasses.replace(model, config=config)
    gradients = make_gradients(only, run.step_options, run.mesh)

    def evaluate(params, router, batch: Batch):
        # No target counts, so the balance loss is the only one.
        batch = batch._replace(loss_mask_BT=jnp.zeros_like(batch.loss_mask_BT))
        grads, _, _ = gradients(params, router, batch, jnp.int32(0))
        return reduce_leaves(only, grads, leaf_norm)

    compiled = jax.jit(evaluate, out_shardings=replicated(run.mesh))
    state = subject.state()
    balance = by_layer(only, jax.device_get(compiled(state.params, state.router, subject.batch)))
    language = subject.probe.gradients
    ratios = {}
    for layer in subject.moe_layers:
        names = [name for name in subject.router_parameters if layer_of(name) == str(layer)]
        above, below = (
            math.sqrt(sum(float(norms[name]) ** 2 for name in names))
            for norms in (balance, language)
        )
        ratios[layer] = above / below if below else math.inf if above else 0.0
    return ratios
