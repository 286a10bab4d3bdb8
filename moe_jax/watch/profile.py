"""Traces of a live run."""

from collections.abc import Callable

import jax

from moe_jax.files.workdir import Folder, Mirror


class Profiler:
    """Captures the steps of `train.profile_steps` into WORKDIR/profile (TensorBoard, Perfetto)."""

    def __init__(self, steps: range, workdir: Folder, say: Callable[[str], None]):
        self._steps = steps
        self._folder = workdir / "profile"
        self._say = say
        self._tracing = False

    def turns(self, step: int) -> bool:
        """Whether tracing begins or ends before `step`: let all earlier steps end, then `turn`."""
        return (step in self._steps) != self._tracing

    def turn(self) -> None:
        """Begin or end."""
        if self._tracing:
            self.close()
            return
        self._mirror = Mirror(self._folder)
        jax.profiler.start_trace(str(self._mirror.folder))
        self._tracing = True

    def close(self) -> None:
        """Write the trace, if one is being taken."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self._mirror.close()
            self._say(f"trace written to {self._folder}")
