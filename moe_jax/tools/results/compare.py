"""Compares runs with a baseline: steps, FLOPs and time until its final held-out loss L*."""

import bisect
import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_jax.errors import UserError
from moe_jax.tools.results.decay import decay_fault, split_finished
from moe_jax.tools.results.group import Group, Spread, group, sample_difference, spread_of
from moe_jax.tools.results.read import Result, read_run


class Crossing(NamedTuple):
    """The step at which a held-out curve reaches a loss for good."""

    step: float  # between two evaluations; linear in the step
    at_most: bool  # True: the first evaluation is below the loss, so `step` is an upper bound


@dataclasses.dataclass(frozen=True)
class Speed:
    """One run against the baseline.

    Attributes:
      above: its final loss less L*, nats per token; above 0: it does not reach L*.
      crossing: where its curve reaches L*; None: it does not.
      steps: speed-up in steps: steps of the baseline / steps of this run until L*; None: L* is not
        reached.
      flops: the same ratio of model FLOPs; None: L* is not reached.
      seconds: the same ratio of training time; None: L* is not reached, or a run has no step times.
    """

    above: float
    crossing: Crossing | None = None
    steps: float | None = None
    flops: float | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Compared:
    """One configuration against the baseline, with one `Speed` per run of `group`."""

    group: Group  # its runs
    speeds: tuple[Speed, ...]  # of the runs, in their order

    def spread(self, name: str) -> Spread | None:
        """The spread of a number of `Speed`; None: a run does not have it."""
        values = [getattr(speed, name) for speed in self.speeds]
        return None if None in values else spread_of(values)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All configurations against the baseline.

    Attributes:
      baseline: the runs of the baseline's configuration.
      loss: L*, mean final held-out loss of the baseline, nats per token.
      steps: steps of a baseline run.
      flops: model FLOPs of a baseline run.
      seconds: mean training time of the baseline; None: not recorded.
      others: the other configurations, in order of appearance.
      left_out: one sentence per run that is not compared.
    """

    baseline: Group
    loss: float
    steps: int
    flops: float
    seconds: float | None
    others: tuple[Compared, ...]
    left_out: tuple[str, ...]


def with_baseline(
    results: Sequence[Result], workdir: Path, baseline: Path
) -> tuple[list[Result], str]:
    """Find the baseline among the runs, or read it.

    Args:
      results: the runs below `workdir`.
      workdir: the folder that their names are relative to.
      baseline: folder of a run, there or elsewhere.

    Returns:
      The runs with the baseline, and the baseline's name among them.

    Raises:
      UserError: `baseline` is not a run.
    """
    if not os.path.isdir(baseline):
        raise UserError(f"--compare={baseline} is not a folder: name the folder of a finished run.")
    for run in results:
        if os.path.realpath(workdir / run.name) == os.path.realpath(baseline):
            return list(results), run.name
    run = read_run(baseline, str(baseline))
    if run.config is None:
        raise UserError(
            f"--compare={baseline} is not a run ({run.state}): name the folder of a finished run."
        )
    return [*results, run], run.name


def compare(results: Sequence[Result], baseline: str) -> Comparison:
    """Compare every finished configuration with the baseline.

    Args:
      results: runs that differ from the baseline only in the seed belong to the baseline's group.
      baseline: the name of one of them.

    Returns:
      The comparison.  Runs without a finished learning-rate decay, and runs that were evaluated on
      another sample than the baseline, are left out and named.

    Raises:
      UserError: the baseline has no final held-out loss, or no other run can be compared.
    """
    base = next(run for run in results if run.name == baseline)
    _check_baseline(base)
    finished, left_out = split_finished(results)
    groups = group(finished)
    twins = next(each for each in groups if baseline in [run.name for run in each.runs])
    alike: list[Group] = []
    for each in groups:
        difference = sample_difference([base, each.runs[0]])
        if difference:
            named = ", ".join(run.name for run in each.runs)
            left_out.append(f"{named} left out: the runs {difference}")
        elif each is not twins:
            alike.append(each)
    if not alike:
        raise UserError(
            f"--compare={baseline} has nothing to compare with: "
            f"{' '.join(left_out) or 'set --workdir to a folder with other finished runs.'}"
        )
    return _against(twins, alike, left_out)


def reach(curve: Sequence[tuple[int, float]], loss: float) -> Crossing | None:
    """Find the step from which on a curve stays at or below a loss until its end.

    Args:
      curve: (step, held-out loss) in the order of steps; at least one.
      loss: the loss to reach, nats per token.

    Returns:
      The crossing, linear between evaluations; None: the curve ends above `loss`.
    """
    above = [place for place, (_, value) in enumerate(curve) if value > loss]
    if not above:
        return Crossing(float(curve[0][0]), True)
    last = above[-1]
    if last == len(curve) - 1:
        return None
    (before, high), (after, low) = curve[last : last + 2]
    return Crossing(before + (after - before) * (high - loss) / (high - low), False)


def seconds_until(run: Result, step: float | int) -> float | None:
    """The seconds of training until a step, linear between logged steps.

    Args:
      run: the run.
      step: at most its last step.

    Returns:
      Seconds, without evaluations and saves; None: the run has no step times up to there.
    """
    steps = [0, *(at for at, _ in run.seconds)]
    times = [0.0, *(time for _, time in run.seconds)]
    place = bisect.bisect_left(steps, step)
    if place == len(steps):
        return None
    if place == 0:
        return 0.0
    share = (step - steps[place - 1]) / (steps[place] - steps[place - 1])
    return times[place - 1] + share * (times[place] - times[place - 1])


def flops_until(run: Result, step: float | int) -> float:
    """The model FLOPs of a run's first `step` steps."""
    assert run.flops_per_token is not None and run.step_tokens is not None
    return run.flops_per_token * run.step_tokens * step


def _check_baseline(base: Result) -> None:
    if base.config is None:
        raise UserError(
            f"--compare={base.name} is not a run ({base.state}): name the folder of a finished run."
        )
    fault = decay_fault(base)
    if fault:
        raise UserError(f"--compare={base.name} {fault}. Name a run that is finished.")


def _against(twins: Group, others: Sequence[Group], left_out: Sequence[str]) -> Comparison:
    first = twins.runs[0]
    steps = first.heldout[-1][0]
    times = [seconds_until(run, steps) for run in twins.runs]
    known = [time for time in times if time is not None]
    whole = Comparison(
        baseline=twins,
        loss=statistics.mean(run.heldout[-1][1] for run in twins.runs),
        steps=steps,
        flops=flops_until(first, steps),
        seconds=statistics.mean(known) if len(known) == len(times) else None,
        others=(),
        left_out=tuple(left_out),
    )
    compared = tuple(
        Compared(each, tuple(_speed(run, whole) for run in each.runs)) for each in others
    )
    return dataclasses.replace(whole, others=compared)


def _speed(run: Result, whole: Comparison) -> Speed:
    above = run.heldout[-1][1] - whole.loss
    crossing = reach(run.heldout, whole.loss)
    if crossing is None:
        return Speed(above)
    time = seconds_until(run, crossing.step)
    return Speed(
        above,
        crossing,
        whole.steps / crossing.step,
        whole.flops / flops_until(run, crossing.step),
        whole.seconds / time if whole.seconds and time else None,
    )
