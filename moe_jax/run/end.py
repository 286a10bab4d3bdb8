"""Where a run ends: at train.steps, or where a source was read data.max_epochs times."""

from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.checkpoint.agree import lead_decides
from moe_jax.record.report import METRICS, has_last_eval
from moe_jax.record.rewind import Rewind, last_step
from moe_jax.run.context import Run


class End(NamedTuple):
    """The end of a run, as long as it does not go back once more."""

    step: int  # the last one
    of: int  # train.steps
    epochs: int  # data.max_epochs where that ends the run before train.steps, else 0
    text: str  # what is used up by then
    line: str  # for the start-up log; empty where text is read for ever

    def reached(self, step: int) -> str:
        """That `step`, the run's last, is done, and what would take it further."""
        if self.epochs:
            return f"{self.used_up(step)} is done, raise data.max_epochs to go on"
        return f"step {step} of {self.of} is done: raise train.steps to go on"

    def used_up(self, step: int) -> str:
        """Where `data.max_epochs` ended the run."""
        return f"the {self.text} is used up: step {step} of {self.of}"


def end_of(run: Run, rewinds: Sequence[Rewind]) -> End:
    """Batches that the run has left out by going back are used up as well."""
    steps, epochs = run.config.train.steps, run.config.data.max_epochs
    if run.supply is None:
        return End(steps, steps, 0, "", "")
    last, text = last_step(rewinds, run.supply.steps), run.supply.text(run.store.streams)
    line = f"data.max_epochs {epochs}: the {text} is used up after step {last}"
    if last >= steps:
        return End(steps, steps, 0, "", f"{line}, the run ends at {steps}")
    share = float(run.optimizer.schedule(last - 1)) / run.config.optimizer.learning_rate
    line += f", the run ends there and not at train.steps {steps}, at {share:.0%} of the peak rate"
    return End(last, steps, epochs, text, line)


def is_finished(run: Run, end: End, step: int) -> bool:
    """Whether the run has come to its end at `step`, its last evaluation included.

    All processes must call this: process 0 reads the metrics.
    """
    if step < end.step:
        return False
    last = end.of if end.epochs else step

    def evaluated() -> int:
        return int(has_last_eval(run.workdir / METRICS, last, end.epochs))

    return bool(lead_decides(evaluated))
