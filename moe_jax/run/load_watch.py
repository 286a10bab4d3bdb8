"""Follows the load of every MoE layer and says when a router collapses.

L MoE layers, E experts, K assignments per token.  The balance loss does not reveal a collapse: near
a uniform softmax it is close to 1 for any load.  The load itself is therefore followed.
"""

from collections.abc import Callable

import numpy as np

from moe_jax.train.metrics import COLLAPSED, effective_share, load_summary

DECAY = 0.98  # of the moving means: about the last 50 steps
# Until then routers are uneven in healthy runs, too: with sigmoid_bias and 64 experts, layers that
# end at 0.95 of the experts are below COLLAPSED up to step 150 (docs/learning.md).
FIRST_STEP = 300
RECOVERED = 2 * COLLAPSED


class LoadWatch:
    """Moving means of the load of each layer, and a line when a layer collapses or recovers.

    The means start again with each attempt, so no row of metrics.jsonl may hold them: a resumed run
    writes the rows of a run that was never stopped.

    Args:
      choices: K.
      say: called with the lines.
    """

    def __init__(self, choices: int, say: Callable[[str], None]):
        self._choices, self._say = choices, say
        self._sums_2L: np.ndarray | None = None  # of max / mean, and of effective experts
        self._weight = 0.0  # of all steps seen: the sums are divided by it
        self._collapsed: set[int] = set()

    def saw(self, step: int, load_LE: np.ndarray) -> None:
        """Add a step.

        Args:
          step: 1-based.
          load_LE: assignments per expert before any drop.
        """
        summary = load_summary(np.asarray(load_LE, np.float64))
        seen_2L = np.array([summary["load_max_over_mean"], summary["effective_experts"]])
        before_2L = np.zeros_like(seen_2L) if self._sums_2L is None else self._sums_2L
        self._sums_2L = DECAY * before_2L + (1 - DECAY) * seen_2L
        self._weight = DECAY * self._weight + 1 - DECAY
        if step >= FIRST_STEP:
            for layer, (busiest, effective) in enumerate(self._sums_2L.T / self._weight):
                self._judge(step, layer, busiest, effective, load_LE.shape[1])

    def _judge(self, step: int, layer: int, busiest: float, effective: float, experts: int) -> None:
        share = effective_share(effective, experts, self._choices)
        figures = (
            f"{effective:.0f} of {experts} experts are effective, the busiest gets {busiest:.1f} "
            f"times the mean load"
        )
        if share < COLLAPSED and layer not in self._collapsed:
            self._collapsed.add(layer)
            first = "make this layer dense (model.moe.first_dense), or " if layer == 0 else ""
            advice = f"{first}raise model.moe.balance_weight"
            self._say(
                f"step {step}: the router of MoE layer {layer} has collapsed: {figures}. "
                f"{advice[0].upper()}{advice[1:]}."
            )
        elif share >= RECOVERED and layer in self._collapsed:
            self._collapsed.remove(layer)
            self._say(f"step {step}: the router of MoE layer {layer} has recovered: {figures}")
