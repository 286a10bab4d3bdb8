"""The age of this process."""

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()


def process_age() -> float:
    """The seconds since this process began, including the interpreter's start and all imports.

    On systems other than Linux: seconds since this module was imported.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot; see proc(5)
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED
