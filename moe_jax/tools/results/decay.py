"""Decides whether a run's final loss is that of a finished learning-rate schedule."""

from collections.abc import Sequence

from moe_jax.tools.results.read import DONE, Result

# Schedules whose rate does not depend on train.steps.
ENDLESS = ("constant", "inverse_sqrt")


def decay_fault(run: Result) -> str:
    """Say why a run has no final held-out loss with a finished schedule.

    Args:
      run: a run with a config; the schedules of ENDLESS are finished at the run's last step.

    Returns:
      The rest of a sentence after the run's name; empty: the last number of `run.heldout` is it.
    """
    assert run.config is not None
    steps = run.config.train.steps
    if not run.heldout:
        return "has no held-out loss: set eval.rows and let the run end"
    if run.state != DONE:
        return f"is not finished ({run.state}), so its learning rate has not decayed"
    if (run.last_step or 0) < steps:
        return (
            f"ended at step {run.last_step} of {steps} (data.max_epochs), before its learning rate "
            f"had decayed"
        )
    if run.heldout[-1][0] < steps:
        return f"has no finite held-out loss at its last step, {steps}"
    return ""


def split_finished(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Separate the runs that have a final held-out loss.

    Args:
      results: runs.

    Returns:
      These runs, and one sentence for each of the others.
    """
    finished, left_out = [], []
    for run in results:
        fault = f"has no config ({run.state})" if run.config is None else decay_fault(run)
        if fault:
            left_out.append(f"{run.name} left out: it {fault}.")
        else:
            finished.append(run)
    return finished, left_out


def endless(run: Result) -> str:
    """The run's schedule if its rate has no decay to a last step; else empty."""
    schedule = "" if run.config is None else run.config.optimizer.schedule
    return schedule if schedule in ENDLESS else ""
