"""What a person gets to read of the errors that Orbax raises."""

import errno
import functools
import logging
import os
import re
import sys
from typing import Any

from absl import logging as absl_logging


def cause_of(error: BaseException) -> str:
    """The innermost cause in one line: Orbax wraps the reason in several generic errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = re.sub(r" \[\w+='.*", "", line)  # TensorStore appends whole specs and source lines
    for number in errno.errorcode:  # and it begins with every path on its way down
        if line.endswith(f": {os.strerror(number)}"):
            return os.strerror(number)
    return line if len(line) <= 300 else f"...{line[-300:]}"  # it begins with the outermost cause


@functools.cache
def quiet_orbax() -> None:
    """From now on a person gets our sentence instead of tracebacks of what Orbax also raises.

    Its threads log what they raise, also in the middle of a training step.  And it closes its event
    loop at the first leaf that cannot be read or written: what TensorStore then answers of the
    others raises in threads where Python can only print it.
    """
    before = sys.unraisablehook

    def ours(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    absl_logging.get_absl_logger().addFilter(ours)
    sys.unraisablehook = hook
