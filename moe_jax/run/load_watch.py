"""Follows the load of every MoE layer and says when a router collapses.

L MoE layers, E experts.  The balance loss does not reveal a collapse: near a uniform softmax it is
close to 1 for any load.  The load itself is therefore checked.
"""

from collections.abc import Callable

import numpy as np

from moe_jax.train.metrics import load_summary

DECAY = 0.98  # of the moving means: about the last 50 steps
FIRST_STEP = 100  # until then routers are uneven in healthy runs, too
# A layer has collapsed if its max / mean load reaches min(COLLAPSED, SHARE * E / K); E / K is the
# largest possible ratio.  It has recovered when the ratio is below half that limit.  Healthy runs
# stay below 2; collapsed ones were at 7 to 12 (64 experts, docs/learning.md).
COLLAPSED, SHARE = 4.0, 0.75


class LoadWatch:
    """Moving means of the load of each layer, and a line when a layer collapses or recovers.

    Args:
      choices: K, assignments per token.
      say: called with the lines.
    """

    def __init__(self, choices: int, say: Callable[[str], None]):
        self._choices, self._say = choices, say
        self._mean_L: np.ndarray | None = None  # of max / mean
        self._effective_L = np.zeros(0)
        self._weight = 0.0  # of all steps seen: the moving means are divided by it
        self._collapsed: set[int] = set()

    def saw(self, step: int, load_LE: np.ndarray) -> None:
        """Add a step.

        Args:
          step: 1-based.
          load_LE: assignments per expert before any drop.
        """
        summary = load_summary(np.asarray(load_LE, np.float64))
        ratio_L = np.asarray(summary["load_max_over_mean"])
        effective_L = np.asarray(summary["effective_experts"])
        if self._mean_L is None:
            self._mean_L, self._effective_L = np.zeros_like(ratio_L), np.zeros_like(ratio_L)
        self._weight = DECAY * self._weight + 1 - DECAY
        self._mean_L = DECAY * self._mean_L + (1 - DECAY) * ratio_L
        self._effective_L = DECAY * self._effective_L + (1 - DECAY) * effective_L
        if step >= FIRST_STEP:
            self._tell(step, load_LE.shape[1])

    def violation(self) -> float:
        """The moving mean of max / mean - 1 of the worst layer; 0 before the first step."""
        if self._mean_L is None:
            return 0.0
        return float(self._mean_L.max() / self._weight) - 1

    def _tell(self, step: int, experts: int) -> None:
        assert self._mean_L is not None
        limit = min(COLLAPSED, SHARE * experts / self._choices)
        for layer, ratio in enumerate(self._mean_L / self._weight):
            if ratio >= limit and layer not in self._collapsed:
                self._collapsed.add(layer)
                effective = self._effective_L[layer] / self._weight
                self._say(
                    f"step {step}: the router of MoE layer {layer} has collapsed: its busiest "
                    f"expert gets {ratio:.1f} times the mean load, {effective:.0f} of {experts} "
                    f"experts are effective. Raise model.moe.balance_weight, or set "
                    f"model.moe.router sigmoid_bias."
                )
            elif ratio < limit / 2 and layer in self._collapsed:
                self._collapsed.remove(layer)
                self._say(
                    f"step {step}: the router of MoE layer {layer} has recovered: its busiest "
                    f"expert gets {ratio:.1f} times the mean load"
                )
