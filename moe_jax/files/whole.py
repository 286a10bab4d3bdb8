"""Files that are there whole or not at all."""

import contextlib
import errno
from collections.abc import Iterator

from etils import epath

from moe_jax.errors import UserError


@contextlib.contextmanager
def write_whole(path: epath.Path, what: str) -> Iterator[epath.Path]:
    """A file to write: it takes the place of `path` if the block ends well, and else is removed.

    Args:
      path: local or gs://; its folder is made.
      what: the file's part in the sentence, such as "The output".

    Raises:
      UserError: it cannot be written, found out before the block begins where that is possible.
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
        advice = "make room there" if error.errno == errno.ENOSPC else "name another"
        raise UserError(
            f"{what} {path} cannot be written ({error.strerror or error}): {advice}."
        ) from None
