"""Saves, verifies and restores checkpoints; the only adapter over Orbax."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from moe_jax.checkpoint import manifest
from moe_jax.checkpoint.agree import first_of_all, lead_decides
from moe_jax.checkpoint.causes import cause_of
from moe_jax.checkpoint.commit import Handler, Marked, Renamed, Restore, Save
from moe_jax.checkpoint.folder import StepFolder
from moe_jax.checkpoint.tree import (
    Leaf,
    abstract,
    array_digest,
    check_same,
    free_bytes,
    named_leaves,
)
from moe_jax.errors import UserError
from moe_jax.files import formats, json_files
from moe_jax.parallel.distributed import lost_peer

Report = Callable[[str], None]
# Exceptions of Orbax and TensorStore for files they cannot read or metadata they cannot parse.
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(RuntimeError, MemoryError),  # RuntimeError: TensorStore was given text that is not UTF-8
)


class Checkpoints:
    """The checkpoints under `root`, a directory each; every process of a run creates one object.

    Nothing is written before the first `save`, so reading a folder through this class is safe.

    Args:
      root: WORKDIR/checkpoints, a local path (relative or absolute) or gs://, visible to all
        processes.
      keep_last: number of newest checkpoints that retention keeps.
      keep_every: retention never deletes checkpoints of steps divisible by this; 0: it may delete
        any older checkpoint.
    """

    def __init__(self, root: os.PathLike[str] | str, keep_last: int = 3, keep_every: int = 0):
        self._folder = StepFolder(root, keep_last, keep_every)
        self.root = self._folder.root
        self._saving: int | None = None  # the step whose checkpoint is being written
        self._needed = 0  # bytes of its arrays
        # Weights hardly compress, and zstd is slower than a disk; zarr3 loads slower (128 MiB: 0.67
        # against 0.13 s).  OCDBT saves 1.5x slower than a file per shard, but a checkpoint has only
        # a few files for any number of leaves and devices.
        self._handler = Handler(use_ocdbt=True, use_zarr3=False, use_compression=False)
        unfinished = Marked if "://" in os.fspath(root) else Renamed
        self._orbax = ocp.AsyncCheckpointer(self._handler, temporary_path_class=unfinished)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending, good or bad; without unfinished saves."""
        return self._folder.steps()

    def incomplete(self, step: int) -> str | None:
        """The first missing or wrongly sized file of a checkpoint, or None; reads no contents."""
        return manifest.incomplete(self._folder.path(step))

    def verify(self, step: int) -> str | None:
        """The first fault of a checkpoint, or None if it has none; reads every byte."""
        return manifest.verify(self._folder.path(step))

    def examine(self, step: int) -> str | None:
        """`verify` an untrusted checkpoint: its arrays' declared sizes must also fit its files."""
        directory = self._folder.path(step)
        return (
            manifest.incomplete(directory)
            or manifest.undeclared(directory)
            or manifest.verify(directory)
        )

    def quarantined(self) -> list[str]:
        """Names of the directories in quarantine/."""
        return self._folder.quarantined()

    def size(self, step: int) -> int:
        """Bytes of a checkpoint on disk."""
        return manifest.size(self._folder.path(step))

    def latest_good(self, report: Report = lambda text: None) -> int | None:
        """The step of the newest checkpoint that verifies; None if there are no checkpoints.

        Newer checkpoints that do not verify are moved to quarantine/, each reported in one
        sentence.  All processes must call this: each hashes its share of the files.

        Raises:
          UserError: there are checkpoints, but none verifies; none is moved then.
        """
        return self._walk_back(lambda step: first_of_all(self._verify_share(step)), report)

    def restore_latest(
        self, tree_of: Callable[[int], Any], report: Report = lambda text: None
    ) -> tuple[int, Any] | None:
        """Restore `latest_good` as (step, tree), loading and verifying each candidate in parallel.

        Loaded arrays are discarded if their step does not verify.

        Args:
          tree_of: step -> the `tree` argument of `restore`.
          report: called with one sentence per quarantined step, and with sizes and seconds.

        Raises:
          UserError: as `latest_good` and `restore`.
        """
        loaded: dict[int, tuple[Any, str]] = {}

        def attempt(step: int) -> str | None:
            reason = first_of_all(self.incomplete(step))
            if reason is not None:
                return reason
            with ThreadPoolExecutor(1) as pool:
                verdict = pool.submit(_timed, lambda: self._verify_share(step))
                back, seconds = _timed(lambda: _caught(lambda: self.restore(step, tree_of(step))))
            mine, verify_seconds = verdict.result()
            reason = first_of_all(mine)
            if reason is not None:
                return reason
            # The files are intact, so an older step would not help: the user must fix the cause.
            error = back if isinstance(back, Exception) else None
            wrong = first_of_all((str(error) or repr(error)) if error else None)
            if wrong is not None:
                raise error or UserError(f"Another process failed: {wrong}")
            loaded[step] = (
                back,
                f"checkpoint of step {step}: {formats.size(self.size(step), 1)} loaded in "
                f"{seconds:.2f} s and, in parallel, verified in {verify_seconds:.2f} s",
            )
            return None

        step = self._walk_back(attempt, report)
        if step is None:
            return None
        back, line = loaded[step]
        report(line)
        return step, back

    def _verify_share(self, step: int) -> str | None:
        """`verify` this process's share of the files."""
        share = (jax.process_index(), jax.process_count())
        return manifest.verify(self._folder.path(step), share)

    def _walk_back(self, attempt: Callable[[int], str | None], report: Report) -> int | None:
        """The newest step for which `attempt` returns no fault on any process."""
        self.wait()
        bad: dict[int, str] = {}

        def newest() -> int | None:
            return max((step for step in self.steps() if step not in bad), default=None)

        def set_aside() -> None:
            for worse, why in bad.items():
                aside = self._folder.set_aside(worse)
                report(f"Checkpoint of step {worse} is bad ({why}); moved to {aside}.")

        while (step := lead_decides(newest)) is not None:
            reason = attempt(step)
            if reason is None:
                lead_decides(set_aside)
                return step
            bad[step] = reason
        if bad:
            raise UserError(
                f"No checkpoint under {self.root} verifies (newest: step {max(bad)}, "
                f"{bad[max(bad)]}): restore a copy, or start over in another --workdir."
            )
        return None

    def pin(self, step: int) -> None:
        """Exempt `step` from retention for the lifetime of this object."""
        self._folder.pin(step)

    def latest_good_before(self, step: int) -> int | None:
        """The newest step below `step` that verifies, or None; moves no step."""
        self.wait()

        def walk_back() -> int | None:
            before = (found for found in reversed(self.steps()) if found < step)
            return next((found for found in before if self.verify(found) is None), None)

        return lead_decides(walk_back)

    def set_aside_after(self, step: int, report: Callable[[str], None] = lambda text: None) -> None:
        """Move all steps after `step` to quarantine/, each reported in one sentence."""
        self.wait()

        def move() -> None:
            for later in reversed([found for found in self.steps() if found > step]):
                report(f"Checkpoint of step {later} moved to {self._folder.set_aside(later)}.")

        lead_decides(move)

    def save(self, step: int, tree: Any, extra_files: Mapping[str, Any] = {}) -> bool:
        """Start to write `tree` as `step` and return; later changes of the values are not saved.

        Blocks until an earlier save is done, then applies retention.  An existing step is not
        overwritten.  All processes must call this.

        Args:
          step: the number of the step.
          tree: any pytree of jax.Arrays, NumPy arrays and Python numbers (see `named_leaves`).
          extra_files: file name -> JSON value; these files are stored in the step's folder and
            verified like all others.

        Returns:
          True if a save was started, False if the step already existed.

        Raises:
          UserError: this or the earlier save cannot be written; older steps are untouched.
        """
        self.wait()
        leaves = named_leaves(tree)
        shapes = [abstract(leaf) for leaf in leaves.values()]  # refuses what has no stable bytes
        self._needed = sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in shapes)

        def prepare() -> int | None:
            with self._writing(step):
                return step if self._folder.make_room(step) else None

        if lead_decides(prepare) is None:
            return False
        arrays = {k: v if isinstance(v, jax.Array) else np.asarray(v) for k, v in leaves.items()}
        item = unflatten_dict(arrays, sep="/")  # on disk every tree is nested dicts
        self._handler.extra_files = extra_files
        with self._writing(step):
            self._orbax.save(self._folder.path(step), args=Save(item), force=True)
        self._saving = step
        return True

    def wait(self) -> None:
        """Block until the current save is committed, then apply retention.

        Raises:
          UserError: the save could not be written; older steps are untouched.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        with self._writing(step):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._folder.retain()

    def close(self) -> None:
        """Wait for the current save, then release Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def extra_file(self, step: int, name: str) -> Any:
        """The JSON value of the additional file `name` of `step`; None if there is no such file.

        Raises:
          UserError: the file cannot be read; this cannot happen if the step verifies.
        """
        try:
            return json_files.read(self._folder.path(step) / name)
        except FileNotFoundError:
            return None

    def describe(self, step: int) -> dict[str, Leaf]:
        """The shape and dtype of every leaf of `step` by name; reads no array."""
        with self._reading(step):
            tree = self._handler.metadata(self._folder.path(step)).tree
            return {
                name: Leaf(leaf.shape, np.dtype(leaf.dtype))
                for name, leaf in named_leaves(tree).items()
            }

    def restore(self, step: int, tree: Any) -> Any:
        """Load `step` as a pytree with the structure of `tree`.

        Args:
          step: a step that verifies (`latest_good`).
          tree: pytree of jax.ShapeDtypeStructs.  A leaf with a sharding is restored as a jax.Array
            with that sharding, for any mesh that wrote it; a leaf without one as a NumPy array.

        Raises:
          UserError: a leaf is missing, unknown, or has another shape or dtype (nothing is loaded
            then, because Orbax would cast silently), or the step cannot be read.
        """
        return self._restore(step, "", tree)

    def restore_subtree(self, step: int, name: str, tree: Any) -> Any:
        """Load only the subtree under the key `name`; otherwise as `restore`."""
        return self._restore(step, f"{name}/", tree)

    def digest(self, step: int, name: str = "params") -> str:
        """The SHA-256 of the arrays under the key `name` (`array_digest`), read leaf by leaf."""
        prefix = f"{name}/"
        leaves = {k: v for k, v in self.describe(step).items() if k.startswith(prefix)}
        return array_digest(
            (k.removeprefix(prefix), self._load(step, {k: leaves[k]})[k]) for k in sorted(leaves)
        )

    def _restore(self, step: int, prefix: str, tree: Any) -> Any:
        wanted = {f"{prefix}{k}": abstract(v) for k, v in named_leaves(tree).items()}
        saved = {k: v for k, v in self.describe(step).items() if k.startswith(prefix)}
        check_same(os.fspath(self._folder.path(step)), saved, wanted)
        loaded = self._load(step, wanted) if wanted else {}  # Orbax refuses an empty tree
        return jax.tree.unflatten(jax.tree.structure(tree), [loaded[name] for name in wanted])

    def _load(self, step: int, leaves: dict[str, Leaf]) -> dict[str, Any]:
        def how(leaf: Leaf) -> ocp.RestoreArgs:
            if leaf.sharding is None:
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )

        args = Restore(
            unflatten_dict(leaves, sep="/"),
            restore_args=unflatten_dict({k: how(leaf) for k, leaf in leaves.items()}, sep="/"),
            partial_restore=True,
        )
        with self._reading(step):
            # Not through the checkpointer, which has a barrier: all processes would wait for one
            # that could not read its part.
            return named_leaves(self._handler.restore(self._folder.path(step), args=args))

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Turn an error into a UserError: which step failed, why, and how much space it needs."""
        try:
            yield
        except (OSError, ValueError) as error:
            if lost_peer(error):  # the disk is fine: the user has nothing to fix
                raise
            with contextlib.suppress(OSError):  # the unfinished save would occupy the disk
                self._folder.remove_leftovers(again=True)
            free = free_bytes(self.root)
            there = "" if free is None else f" and {formats.size(free, 1)} are free"
            raise UserError(
                f"The checkpoint {self._folder.path(step)} cannot be written ({cause_of(error)}; "
                f"it needs {formats.size(self._needed, 1)}{there}): make room or fix the "
                f"permissions, then run the same command again."
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            if lost_peer(error):
                raise
            raise UserError(
                f"The checkpoint {self._folder.path(step)} cannot be read ({cause_of(error)})."
            ) from error


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `action`, and the seconds it took."""
    began = time.perf_counter()
    return action(), time.perf_counter() - began


def _caught(action: Callable[[], Any]) -> Any:
    """The result of `action`, or its exception: parsing damaged bytes may raise any exception."""
    try:
        return action()
    except Exception as error:
        return error
