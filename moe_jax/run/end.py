"""The step at which a run ends: train.steps, or earlier if data.max_epochs exhausts the text."""

from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.checkpoint.agree import lead_decides
from moe_jax.record.report import METRICS, has_last_eval
from moe_jax.record.rewind import Rewind, last_step
from moe_jax.run.context import Run


class End(NamedTuple):
    """The end of a run; valid until the next rewind."""

    step: int  # the last step
    planned_steps: int  # train.steps
    epochs: int  # data.max_epochs if it ends the run before train.steps, else 0
    text: str  # names the stream that data.max_epochs exhausts; empty if none is
    line: str  # for the start-up log; empty without a limit from data.max_epochs

    def reached(self, step: int) -> str:
        """The line that says `step` was the last, and which key to raise to train longer."""
        if self.epochs:
            return f"{self.used_up(step)} is done, raise data.max_epochs to continue"
        return f"step {step} of {self.planned_steps} is done: raise train.steps to continue"

    def used_up(self, step: int) -> str:
        """The line that says at which step `data.max_epochs` ended the run."""
        return f"the {self.text} is used up: step {step} of {self.planned_steps}"


def end_of(run: Run, rewinds: Sequence[Rewind]) -> End:
    """Compute the end of a run; batches that a rewind skipped count as read."""
    steps, epochs = run.config.train.steps, run.config.data.max_epochs
    if run.supply is None:
        return End(steps, steps, 0, "", "")
    last, text = last_step(rewinds, run.supply.steps), run.supply.text(run.store.streams)
    line = f"data.max_epochs {epochs}: the {text} is used up after step {last}"
    if last >= steps:
        return End(steps, steps, 0, "", f"{line}; the run ends at train.steps {steps}")
    share = float(run.optimizer.schedule(last - 1)) / run.config.optimizer.learning_rate
    line += (
        f"; the run ends there, before train.steps {steps}, with the learning rate at {share:.0%} "
        f"of its peak"
    )
    return End(last, steps, epochs, text, line)


def is_finished(run: Run, end: End, step: int) -> bool:
    """True if the run has reached its end at `step` and its last evaluation is recorded.

    All processes must call this, because process 0 reads the metrics for all.
    """
    if step < end.step:
        return False
    last = end.planned_steps if end.epochs else step

    def evaluated() -> int:
        return int(has_last_eval(run.workdir / METRICS, last, end.epochs))

    return bool(lead_decides(evaluated))
