"""Writes a file completely or not at all."""

import contextlib
import errno
from collections.abc import Iterator

from etils import epath

from moe_jax.errors import UserError


@contextlib.contextmanager
def write_whole(path: epath.Path, what: str) -> Iterator[epath.Path]:
    """Yield a temporary file that replaces `path` if the block succeeds and is removed if it fails.

    Args:
      path: local path or gs:// URL; its folder is created.
      what: what an error message calls the file, such as "The output".

    Raises:
      UserError: the file cannot be written; raised before the block begins if already known then.
    """
    unfinished = path.with_name(f"{path.name}.new")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text("")
        try:
            yield unfinished
            unfinished.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
    except OSError as error:
        advice = "make room there" if error.errno == errno.ENOSPC else "name another path"
        raise UserError(
            f"{what} {path} cannot be written ({error.strerror or error}): {advice}."
        ) from None
