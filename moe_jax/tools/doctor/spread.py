"""Trains some steps and says per MoE layer whether the load spreads over the experts or collapses.

The balance loss does not reveal a collapse: near a uniform softmax it is close to 1 for any load,
even if one expert gets 9 times the mean (E = 64, K = 2, one H200, 1,000 steps).  The load itself is
therefore checked.

N steps, L MoE layers, E experts, K assignments per token.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.moe.config import MoEConfig
from moe_jax.run.context import Run, make_optimizer
from moe_jax.run.loop import compile_step
from moe_jax.run.restore import fresh_state
from moe_jax.tools.doctor.finding import Finding, name_layers
from moe_jax.tools.doctor.start import NO_EXPERTS
from moe_jax.tools.doctor.subject import Subject
from moe_jax.train.metrics import COLLAPSED, effective_share, load_summary

SPREAD = "load spreads over the experts"  # the name of the check
LAST = 5  # steps at the end over which figures are averaged
PROGRESS = 10.0  # seconds between two lines
# Effective share of a layer that spreads.  The two layers of shrunk configs/tiny.py have 0.23 and
# 0.00 after 30 steps without a balance loss, and 0.70 and 0.23 with balance_weight 0.01, with which
# they recover (0.68 and 0.62 after 100).
EVEN = 0.5
FIRST_WEIGHT = 0.1  # the balance weight that the advice names if it is 0

Say = Callable[[str], None]


class Trained(NamedTuple):
    """The load and the loss of each step."""

    load_NLE: np.ndarray  # assignments per expert before any drop
    lm_N: np.ndarray  # nats per target
    skipped: int  # steps that the guard skipped
    warmup: int  # steps of linear warm-up


class Layer(NamedTuple):
    """The load of one MoE layer at the first step and over the last steps."""

    number: int
    busiest: tuple[float, float]  # largest load over the mean load: first step, last steps
    effective: tuple[float, float]  # exp of the entropy of the load, in experts
    dead: int  # experts that no token chose in the last steps
    verdict: str  # spreads | uneven | collapses


def load_spreads(subject: Subject, steps: int, say: Say) -> Finding:
    """Train `steps` steps from the initial parameters and judge the load of each MoE layer.

    Args:
      subject: its state is dropped.
      steps: at least 1.
      say: called with a line every 10 s.
    """
    if not subject.moe_layers:
        return NO_EXPERTS
    parts, moe = subject.run.model.components, subject.config.model.moe
    assert parts is not None  # the model has MoE layers
    trained = train(subject, steps, say)
    K = parts.router.choices_per_token
    layers = judge(trained.load_NLE, subject.moe_layers, K)
    worst = max(layers, key=lambda layer: layer.busiest[1])
    figure = (
        f"busiest expert {worst.busiest[1]:.2f} times the mean (worst: layer {worst.number}) after "
        f"{steps} steps, {trained.warmup} of warm-up; lm {trained.lm_N[0]:.2f} -> "
        f"{trained.lm_N[-LAST:].mean():.2f} nats"
    )
    if trained.skipped:
        figure += f"; {trained.skipped} steps skipped"
    if subject.config.data.source != subject.plan.asked.data.source:
        figure += f"; text: {subject.config.data.source}, not the config's own"
    bad = [layer for layer in layers if layer.verdict != "spreads"]
    return Finding(
        all(layer.verdict != "collapses" for layer in layers),
        figure,
        advice(bad, len(layers), steps, moe, subject) if bad else "",
        warns=bool(bad),
        details=tuple(describe(layer, moe.num_experts) for layer in layers),
    )


def train(subject: Subject, steps: int, say: Say) -> Trained:
    """Train from the initial parameters on the run's own batches; nothing is saved."""
    run = _with_warmup(subject, steps)
    if run is subject.run:
        step_fn = subject.step_fn
    else:
        say(f"      compiling a train step with {run.config.optimizer.warmup_steps} warm-up steps")
        step_fn = compile_step(run)
    subject.drop_state()  # two states may not fit at once
    state = fresh_state(run, "", lambda line: None)
    loads, losses, skipped, told = [], [], 0, time.perf_counter()
    with subject.feed(0, steps) as feed:
        for number, batch in feed:
            state, metrics = step_fn(state, batch)
            assert metrics.moe is not None  # the model has MoE layers
            found = (metrics.moe.load_E, metrics.loss.lm, metrics.skipped)
            load_LE, lm, skip = jax.device_get(found)
            loads.append(load_LE)
            losses.append(float(lm))
            skipped += int(skip)
            if time.perf_counter() - told >= PROGRESS:
                told = time.perf_counter()
                busiest = max(load_summary(load_LE)["load_max_over_mean"])
                say(
                    f"      step {number + 1}/{steps}  lm {losses[-1]:.4f}  busiest expert "
                    f"{busiest:.2f} times the mean"
                )
    warmup = run.config.optimizer.warmup_steps
    return Trained(np.stack(loads), np.asarray(losses), skipped, warmup)


def _with_warmup(subject: Subject, steps: int) -> Run:
    """The run with the config's warm-up, at most a third of the steps, then the peak rate.

    The checks before this one run without warm-up, which alone can make a router collapse.
    """
    run, asked = subject.run, subject.plan.asked.optimizer
    warmup = min(asked.warmup_steps, steps // 3)
    if warmup == run.config.optimizer.warmup_steps:
        return run
    optimizer = dataclasses.replace(run.config.optimizer, warmup_steps=warmup)
    # The schedule refuses a warm-up that is longer than the run.
    settings = dataclasses.replace(run.config.train, steps=max(steps, run.config.train.steps))
    config = dataclasses.replace(run.config, optimizer=optimizer, train=settings)
    return dataclasses.replace(run, config=config, optimizer=make_optimizer(config, run.model))


def judge(load_NLE: np.ndarray, numbers: list[int], choices: int) -> list[Layer]:
    """Judge each MoE layer from its load.

    A layer collapses if its effective share over the last steps is below COLLAPSED.  Otherwise it
    spreads if the share is at least EVEN or larger than at the first step, else it is uneven.

    Args:
      load_NLE: assignments per expert in each step.
      numbers: the layers' numbers in the model.
      choices: K.
    """
    E = load_NLE.shape[2]
    first = load_summary(load_NLE[0])
    last = [load_summary(load_LE) for load_LE in load_NLE[-LAST:]]
    dead_L = (load_NLE[-LAST:].sum(0) == 0).sum(1)
    layers = []
    for i, number in enumerate(numbers):
        busiest, effective = (
            (first[name][i], float(np.mean([summary[name][i] for summary in last])))
            for name in ("load_max_over_mean", "effective_experts")
        )
        share = effective_share(effective[1], E, choices)
        if share < COLLAPSED:
            verdict = "collapses"
        else:
            verdict = "spreads" if share >= EVEN or effective[1] > effective[0] else "uneven"
        layers.append(Layer(number, busiest, effective, int(dead_L[i]), verdict))
    return layers


def describe(layer: Layer, num_experts: int) -> str:
    """One line about a layer."""
    return (
        f"layer {layer.number} {layer.verdict}: busiest expert {layer.busiest[0]:.2f} -> "
        f"{layer.busiest[1]:.2f} times the mean, effective experts {layer.effective[0]:.1f} -> "
        f"{layer.effective[1]:.1f} of {num_experts}, dead {layer.dead}"
    )


def advice(bad: list[Layer], of: int, steps: int, moe: MoEConfig, subject: Subject) -> str:
    """The sentence about layers that do not spread: what to change."""
    parts = subject.run.model.components
    assert parts is not None  # the model has MoE layers
    worst = max(layer.busiest[1] for layer in bad)
    where = name_layers([layer.number for layer in bad], of)
    changes = []
    if hasattr(parts.router, "update_rate"):
        changes.append(f"raise model.moe.options.{moe.router}.update_rate")
    elif subject.router_parameters and not moe.freeze_router:
        weight = 10 * moe.balance_weight or FIRST_WEIGHT
        changes.append(f"raise model.moe.balance_weight ({moe.balance_weight:g}) to {weight:g}")
    if not hasattr(parts.router, "update_rate"):
        changes.append("use router sigmoid_bias")
    if [layer.number for layer in bad] == [0] and of > 1:
        changes.append("set model.moe.first_dense=1")
    return (
        f"In {where} the busiest expert gets {worst:.2g} times the mean after {steps} steps: "
        f"{', '.join(changes[:-1])}{', or ' if changes[1:] else ''}{changes[-1]}."
    )
