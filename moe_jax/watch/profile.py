"""Captures profiler traces of a live run."""

from collections.abc import Callable

import jax

from moe_jax.errors import UserError, one_line
from moe_jax.files.workdir import Folder, Mirror

# Native code reports a full disk as a RuntimeError.
_FAILURES = (OSError, RuntimeError, UserError)


class Profiler:
    """Captures the steps of `train.profile_steps` into WORKDIR/profile (TensorBoard, Perfetto).

    If a trace cannot be written, one line reports it and the run continues.
    """

    def __init__(self, steps: range, workdir: Folder, say: Callable[[str], None]):
        self._steps = steps
        self._folder = workdir / "profile"
        self._say = say
        self._mirror: Mirror | None = None  # folder of the current trace; None: not tracing

    def toggles_at(self, step: int) -> bool:
        """True if tracing starts or stops just before `step`.

        The caller must then wait for all earlier steps and call `toggle`.
        """
        return (step in self._steps) != (self._mirror is not None)

    def toggle(self) -> None:
        """Start or stop the trace."""
        if self._mirror is not None:
            self.close()
            return
        try:
            mirror = Mirror(self._folder)
            jax.profiler.start_trace(str(mirror.folder))
        except _FAILURES as error:
            self._say(self._failed(error))
            self._steps = range(0)
            return
        self._mirror = mirror

    def close(self) -> None:
        """Write the current trace, if there is one."""
        mirror, self._mirror = self._mirror, None
        if mirror is None:
            return
        try:
            jax.profiler.stop_trace()
            mirror.close()
        except _FAILURES as error:
            self._say(self._failed(error))
            return
        self._say(f"trace written to {self._folder}")

    def _failed(self, error: Exception) -> str:
        return (
            f"The trace cannot be written to {self._folder} ({one_line(str(error))}): make room or "
            f"check its permissions. The run continues."
        )
