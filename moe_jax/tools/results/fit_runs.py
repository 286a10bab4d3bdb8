"""Fits a scaling law to the runs of a folder."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.errors import UserError
from moe_jax.registry import lookup
from moe_jax.tools.results.decay import split_finished
from moe_jax.tools.results.fit import Fit, fit
from moe_jax.tools.results.group import sample_difference
from moe_jax.tools.results.laws import LAWS, Array, Saturation, effective_experts
from moe_jax.tools.results.read import Result


@dataclasses.dataclass(frozen=True)
class FitReport:
    """A law fitted to runs.

    Attributes:
      found: the fit.
      runs: the runs, in the order of the arrays.
      n: active parameters outside embedding table and head, float [R].
      e: experts per choice, num_experts / K, 1 for a dense model, float [R].
      d: training tokens, padding included, float [R].
      loss: final held-out loss, nats per token, float [R].
      left_out: one sentence per run that is not finished.
    """

    found: Fit
    runs: tuple[Result, ...]
    n: Array
    e: Array
    d: Array
    loss: Array
    left_out: tuple[str, ...]


def fit_runs(results: Sequence[Result], law: str, saturation: Saturation) -> FitReport:
    """Fit a law to the final held-out losses of the finished runs.

    Args:
      results: runs; those without a finished learning-rate decay are left out and named.
      law: a name of LAWS.
      saturation: E_start and E_max.

    Returns:
      The fit with its data.

    Raises:
      UserError: an unknown law, not 0 < E_start < E_max, runs evaluated on different samples, or
        runs that do not determine the law.
    """
    chosen = lookup(LAWS, law, "--fit")
    effective_experts(np.ones(1), saturation)  # raises for wrong bounds, whatever the runs
    runs, left_out = split_finished(results)
    difference = sample_difference(runs)
    if difference:
        raise UserError(f"--fit={law} needs one held-out sample: the runs {difference}")
    n, e, d, loss = (
        np.asarray([take(run) for run in runs], float)
        for take in (
            lambda run: run.active_body,
            lambda run: run.expansion,
            lambda run: run.step_tokens * run.last_step,
            lambda run: run.heldout[-1][1],
        )
    )
    found = fit(chosen, n, e, d, loss, saturation)
    return FitReport(found, tuple(runs), n, e, d, loss, tuple(left_out))
