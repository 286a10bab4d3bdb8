"""Checkpoints: the one adapter over Orbax."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from moe_jax.checkpoint import manifest
from moe_jax.checkpoint.tree import Leaf, abstract, array_digest, check_same, named_leaves, nested
from moe_jax.errors import UserError

QUARANTINE = "quarantine"
_DOOMED = ".doomed"  # suffix of a step that retention is deleting
_LEFTOVERS = ("*.orbax-checkpoint-tmp*", f"*{_DOOMED}")  # of saves and deletions that were killed


class _Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's pytree handler that ends a save with the manifest.

    `finalize` runs on process 0 after every process has written and before the step is renamed.
    """

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        manifest.write(directory)


# Orbax finds a handler by the type of its arguments.
@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.PyTreeSave):
    pass


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.PyTreeRestore):
    pass


class Checkpoints:
    """The steps under `root`, one directory each; every process of a run holds one of these.

    Nothing is written before the first `save`, so opening a folder to look at it is safe.

    Args:
      root: WORKDIR/checkpoints, local (relative or not) or gs://.  All processes must see it.
      keep_last: how many of the newest steps retention keeps.
      keep_every: steps divisible by this are kept for good; 0: none.
    """

    def __init__(self, root: os.PathLike[str] | str, keep_last: int = 3, keep_every: int = 0):
        root = os.fspath(root)
        # Orbax saves under a relative root and then cannot load from it.
        self.root = epath.Path(root if "://" in root else os.path.abspath(root))
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pinned: set[int] = set()
        self._saving: int | None = None  # the step being written
        self._swept = False
        # Weights hardly compress, and zstd is slower than a disk; zarr3 loads slower (128 MiB: 0.67
        # against 0.13 s).  OCDBT saves 1.5x slower than a file per shard, but a step stays at a few
        # files however many leaves and devices there are.
        handler = _Handler(use_ocdbt=True, use_zarr3=False, use_compression=False)
        self._orbax = ocp.AsyncCheckpointer(handler)

    def steps(self) -> list[int]:
        """Steps that were saved, ascending, good or bad; unfinished saves are not among them."""
        return [step for step in self._numbered() if manifest.committed(self._path(step))]

    def verify(self, step: int) -> str | None:
        """None if `step` is as it was written, else why not; reads every byte."""
        return manifest.verify(self._path(step))

    def quarantined(self) -> list[str]:
        """Names of the steps that were set aside, as they stand in quarantine/."""
        aside = self.root / QUARANTINE
        return sorted(path.name for path in aside.iterdir()) if aside.exists() else []

    def size(self, step: int) -> int:
        """Bytes of `step` on disk."""
        return manifest.size(self._path(step))

    def latest_good(self, report: Callable[[str], None] = lambda text: None) -> int | None:
        """The newest step that verifies; None if nothing was ever saved here.

        Newer steps that do not verify are moved to quarantine/, each reported in one sentence.

        Raises:
          UserError: there are steps and none of them verifies; nothing is moved then.
        """
        self.wait()

        def walk_back() -> int | None:
            bad: dict[int, str] = {}
            for step in reversed(self.steps()):
                reason = self.verify(step)
                if reason is None:
                    for worse, why in bad.items():
                        aside = self._quarantine(worse)
                        report(f"Checkpoint of step {worse} is bad ({why}); moved to {aside}.")
                    return step
                bad[step] = reason
            if bad:
                raise UserError(
                    f"No checkpoint under {self.root} verifies (newest: step {max(bad)}, "
                    f"{bad[max(bad)]}): restore a copy, or start over in another --workdir."
                )
            return None

        return _lead_decides(walk_back)

    def pin(self, step: int) -> None:
        """Retention leaves `step` alone for as long as this object lives."""
        self._pinned.add(step)

    def latest_good_before(self, step: int) -> int | None:
        """The newest step below `step` that verifies; None where there is none.  Moves nothing."""
        self.wait()

        def walk_back() -> int | None:
            before = (found for found in reversed(self.steps()) if found < step)
            return next((found for found in before if self.verify(found) is None), None)

        return _lead_decides(walk_back)

    def set_aside_after(self, step: int, report: Callable[[str], None] = lambda text: None) -> None:
        """Moves all later steps to quarantine/, each reported in one sentence."""
        self.wait()

        def move() -> None:
            for later in reversed([found for found in self.steps() if found > step]):
                report(f"Checkpoint of step {later} moved to {self._quarantine(later)}.")

        _lead_decides(move)

    def save(self, step: int, tree: Any) -> bool:
        """Starts writing `tree` as `step` and returns; the values are those of this moment.

        Blocks until an earlier save is done, then applies retention.  A step that is already there
        is left as it is.  All processes must call this.

        Args:
          step: the number of the step.
          tree: any pytree of jax.Arrays, NumPy arrays and Python numbers (see `named_leaves`).

        Returns:
          Whether a save was started.

        Raises:
          UserError: this or the earlier save cannot be written; older steps are untouched.
        """
        self.wait()

        def prepare() -> int | None:
            with self._writing(step):
                self._sweep()
                if step in self.steps():
                    return None
                if self._path(step).exists() and any(self._path(step).iterdir()):
                    self._quarantine(step)  # somebody's files under the name of a step
                self.root.mkdir(parents=True, exist_ok=True)
            return step

        if _lead_decides(prepare) is None:
            return False
        leaves = named_leaves(tree)
        for leaf in leaves.values():
            abstract(leaf)  # refuses what has no stable bytes
        arrays = {k: v if isinstance(v, jax.Array) else np.asarray(v) for k, v in leaves.items()}
        item = nested(arrays)
        with self._writing(step):
            self._orbax.save(self._path(step), args=_Save(item), force=True)
        self._saving = step
        return True

    def wait(self) -> None:
        """Blocks until the save under way is committed, then applies retention.

        Raises:
          UserError: it could not be written; older steps are untouched.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        with self._writing(step):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._retain()

    def close(self) -> None:
        """`wait`, then release Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def describe(self, step: int) -> dict[str, Leaf]:
        """Shape and dtype of every leaf of `step` by name, without reading any array."""
        with self._reading(step):
            metadata: Any = self._orbax.metadata(self._path(step))
            tree = metadata.item_metadata.tree
        return {
            name: Leaf(leaf.shape, np.dtype(leaf.dtype))
            for name, leaf in named_leaves(tree).items()
        }

    def restore(self, step: int, tree: Any) -> Any:
        """`step` as a pytree like `tree`.

        Args:
          step: one that verifies (`latest_good`).
          tree: pytree of jax.ShapeDtypeStructs; a leaf with a sharding is restored as a jax.Array
            laid out so, whatever mesh wrote it, one without as a NumPy array.

        Raises:
          UserError: a leaf is missing, unknown, or of another shape or dtype (nothing is loaded
            then: Orbax would cast silently), or the step cannot be read.
        """
        return self._restore(step, "", tree)

    def restore_subtree(self, step: int, name: str, tree: Any) -> Any:
        """Only what was saved under the key `name` of the tree; otherwise as `restore`."""
        return self._restore(step, f"{name}/", tree)

    def digest(self, step: int, name: str = "params") -> str:
        """SHA-256 of the arrays under the key `name` (`array_digest`), read leaf by leaf."""
        prefix = f"{name}/"
        leaves = {k: v for k, v in self.describe(step).items() if k.startswith(prefix)}
        return array_digest(
            (k.removeprefix(prefix), self._load(step, {k: leaves[k]})[k]) for k in sorted(leaves)
        )

    def _restore(self, step: int, prefix: str, tree: Any) -> Any:
        wanted = {f"{prefix}{k}": abstract(v) for k, v in named_leaves(tree).items()}
        saved = {k: v for k, v in self.describe(step).items() if k.startswith(prefix)}
        check_same(os.fspath(self._path(step)), saved, wanted)
        loaded = self._load(step, wanted) if wanted else {}  # Orbax refuses an empty tree
        return jax.tree.unflatten(jax.tree.structure(tree), [loaded[name] for name in wanted])

    def _load(self, step: int, leaves: dict[str, Leaf]) -> dict[str, Any]:
        def how(leaf: Leaf) -> ocp.RestoreArgs:
            if leaf.sharding is None:
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )

        args = _Restore(
            nested(leaves),
            restore_args=nested({name: how(leaf) for name, leaf in leaves.items()}),
            partial_restore=True,
        )
        with self._reading(step):
            return named_leaves(self._orbax.restore(self._path(step), args=args))

    def _path(self, step: int) -> epath.Path:
        return self.root / str(step)

    def _numbered(self) -> list[int]:
        if not self.root.exists():
            return []
        names = (path.name for path in self.root.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))

    def _quarantine(self, step: int) -> epath.Path:
        """Moves `step` aside under a name that is still free."""
        folder = self.root / QUARANTINE
        target, count = folder / str(step), 1
        while target.exists():
            target, count = folder / f"{step}.{count}", count + 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return self._path(step).rename(target)
        except OSError as error:
            raise UserError(
                f"The checkpoint {self._path(step)} cannot be moved to {target} "
                f"({_cause(error)}): move it yourself, then run the same command again."
            ) from error

    def _retain(self) -> None:
        steps = self.steps()
        for step in steps[: -self._keep_last]:
            for_good = self._keep_every and step % self._keep_every == 0
            if not for_good and step not in self._pinned:
                # Renamed first: a kill half way leaves nothing that looks like a step.
                doomed = self.root / f"{step}{_DOOMED}"
                self._path(step).rename(doomed)
                doomed.rmtree()

    def _sweep(self) -> None:
        """Before the first save: removes what killed saves and deletions left behind."""
        if not self._swept:
            for pattern in _LEFTOVERS:
                for path in self.root.glob(pattern):
                    path.rmtree()
        self._swept = True

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Says in one sentence which step could not be written and why."""
        try:
            with _quiet_orbax():
                yield
        except (OSError, ValueError) as error:
            self._swept = False  # the next save removes the unfinished one
            raise UserError(
                f"The checkpoint {self._path(step)} cannot be written ({_cause(error)}): make room "
                f"or fix the permissions, then run the same command again."
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            with _quiet_orbax():
                yield
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"The checkpoint {self._path(step)} cannot be read ({_cause(error)})."
            ) from error


def _lead_decides(action: Callable[[], int | None]) -> int | None:
    """What `action()` returns on process 0, on every process; if it raises there, all raise."""
    failed, nothing = -2, -1
    code, error = nothing, None
    if jax.process_index() == 0:
        try:
            result = action()
            code = nothing if result is None else result
        except UserError as raised:
            code, error = failed, raised
    if jax.process_count() > 1:
        code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
    if code == failed:
        raise error or UserError("Process 0 cannot go on with its checkpoints: see its message.")
    return None if code == nothing else code


def _cause(error: BaseException) -> str:
    """The innermost cause in one line: Orbax wraps the reason in several generic errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = re.sub(r" \[\w+='.*", "", line)  # TensorStore appends whole specs and source lines
    return line if len(line) <= 300 else f"...{line[-300:]}"  # it begins with the outermost cause


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax logs the traceback of what it also raises; the person gets our sentence instead."""
    logger = absl_logging.get_absl_logger()

    def ours(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger.addFilter(ours)
    try:
        yield
    finally:
        logger.removeFilter(ours)
