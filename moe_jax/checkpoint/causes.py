"""Shortens the errors that Orbax raises to one line for the user."""

import errno
import os
import re


def cause_of(error: BaseException) -> str:
    """The innermost cause on one line; Orbax wraps it in several generic errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = re.sub(r" \[\w+='.*", "", line)  # TensorStore appends whole specs and source lines
    for number in errno.errorcode:  # TensorStore prefixes the cause with every path above it
        if line.endswith(f": {os.strerror(number)}"):
            return os.strerror(number)
    return line if len(line) <= 300 else f"...{line[-300:]}"  # the outermost cause comes first
