"""Ends a run whose copies of the state have come to differ."""

from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.parallel.replicas import Difference, Replicas
from moe_jax.run.context import Run
from moe_jax.train.state import TrainState, placed_state

_LISTED = 8  # devices


class ReplicaCheck:
    """Every `train.replica_check_every` steps and before each save: do all copies agree?

    A checkpoint holds one copy of each part.  As none is written from copies that differ, the
    newest is always one to go on from, and nothing that was saved has to be doubted.
    """

    def __init__(self, run: Run, say: Callable[[str], None]):
        """Compiles; where the config has 0 steps nothing is ever compared."""
        self._run, self._say = run, say
        self._every = run.config.train.replica_check_every
        self._replicas = None
        if self._every:
            self._replicas = Replicas(placed_state(run.model, run.optimizer, run.mesh))
        self._step, self._found, self._agreed = 0, [], None

    def differ(self, step: int, state: TrainState, save_now: bool) -> bool:
        """Whether the state after `step` has copies that differ; False where no check is due.

        Every process must call this, and all get the same.
        """
        if self._replicas is None or not (save_now or step % self._every == 0):
            return False
        self._step, self._found = step, self._replicas.compare(state)
        if not self._found:
            self._agreed = step
        return bool(self._found)

    def give_up(self) -> None:
        """After a difference: ends the save under way and says what to do."""
        self._run.checkpoints.wait()
        saved = self._run.checkpoints.steps()
        self._say(
            f"REPLICAS DIFFER: {describe(self._step, self._found, self._agreed)}.  Nothing is "
            f"saved: run the same command again, which goes on from "
            f"{f'step {saved[-1]}' if saved else 'the beginning'}.  Take a device out that is "
            f"named again."
        )


def describe(step: int, found: Sequence[Difference], agreed: int | None) -> str:
    """What differs after `step`, and since when it may: one sentence without its end."""
    leaves = list(dict.fromkeys(each.leaf for each in found))
    more = f" and {len(leaves) - 1} more leaves" if len(leaves) > 1 else ""
    first = found[0]
    where = f"between {_devices(first.odd)}"
    if first.others:
        where = f"on {_devices(first.odd)} from {_devices(first.others)}"
    before = "nothing was compared before" if agreed is None else f"equal at step {agreed}"
    return f"at step {step} {leaves[0]}{more} differ{'' if more else 's'} {where} ({before})"


def _devices(devices: Sequence[Any]) -> str:
    names = [f"device {device.id} (process {device.process_index})" for device in devices]
    if len(names) > _LISTED:
        names[_LISTED:] = [f"{len(names) - _LISTED} more"]
    return ", ".join(names)
