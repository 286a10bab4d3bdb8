"""Ends a run if replicas of its state differ between devices."""

from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.parallel.replicas import Difference, Replicas
from moe_jax.run.context import Run
from moe_jax.train.state import TrainState, placed_state

_LISTED = 8  # devices


class ReplicaCheck:
    """Compares the replicas every `train.replica_check_every` steps and before each save.

    A checkpoint holds one replica of each shard.  It is written only if the replicas agree, so the
    newest checkpoint is always safe to resume from.
    """

    def __init__(self, run: Run, say: Callable[[str], None]):
        """Compile the comparison; with `train.replica_check_every` 0 nothing is ever compared."""
        self._run, self._say = run, say
        self._every = run.config.train.replica_check_every
        self._replicas = None
        if self._every:
            self._replicas = Replicas(placed_state(run.model, run.optimizer, run.mesh))
        self._step, self._found, self._agreed = 0, [], None

    def differ(self, step: int, state: TrainState, save_now: bool) -> bool:
        """True if a check is due after `step` and finds that replicas of the state differ.

        Every process must call this, and all get the same result.
        """
        if self._replicas is None or not (save_now or step % self._every == 0):
            return False
        self._step, self._found = step, self._replicas.compare(state)
        if not self._found:
            self._agreed = step
        return bool(self._found)

    def give_up(self) -> None:
        """After a difference, wait for the save in progress and log what to do."""
        self._run.checkpoints.wait()
        saved = self._run.checkpoints.steps()
        self._say(
            f"REPLICAS DIFFER: {describe(self._step, self._found, self._agreed)}.  The state was "
            f"not saved.  Run the same command again to resume from "
            f"{f'step {saved[-1]}' if saved else 'the beginning'}.  If the same device is named "
            f"again, take it out of service."
        )


def describe(step: int, found: Sequence[Difference], agreed: int | None) -> str:
    """Describe what differs after `step` and when it was last equal; without a full stop.

    Args:
      step: of the check that found the difference.
      found: the differences; at least one.
      agreed: the last step at which all replicas were equal; None: no earlier check.

    Returns:
      `at step 6 params/x differs on device 5 (process 0) from device 0 (process 0) (equal at ...)`.
    """
    leaves = list(dict.fromkeys(each.leaf for each in found))
    more = f" and {len(leaves) - 1} more leaves" if len(leaves) > 1 else ""
    first = found[0]
    where = f"between {_devices(first.odd)}"
    if first.others:
        where = f"on {_devices(first.odd)} from {_devices(first.others)}"
    before = "no earlier check" if agreed is None else f"equal at step {agreed}"
    return f"at step {step} {leaves[0]}{more} differ{'' if more else 's'} {where} ({before})"


def _devices(devices: Sequence[Any]) -> str:
    names = [f"device {device.id} (process {device.process_index})" for device in devices]
    if len(names) > _LISTED:
        names[_LISTED:] = [f"{len(names) - _LISTED} more"]
    return ", ".join(names)
