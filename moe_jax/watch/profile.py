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
        self._mirror: Mirror | None = None  # where the trace goes, while one is being taken

    def turns(self, step: int) -> bool:
        """Whether tracing begins or ends before `step`: let all earlier steps end, then `turn`."""
        return (step in self._steps) != (self._mirror is not None)

    def turn(self) -> None:
        """Begin or end."""
        if self._mirror is not None:
            self.close()
            return
        mirror = Mirror(self._folder)
        jax.profiler.start_trace(str(mirror.folder))
        self._mirror = mirror

    def close(self) -> None:
        """Write the trace, if one is being taken."""
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            jax.profiler.stop_trace()
            mirror.close()
            self._say(f"trace written to {self._folder}")
