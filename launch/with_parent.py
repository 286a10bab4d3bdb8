"""python with_parent.py PID PROGRAM COMMAND...: becomes COMMAND, and gets SIGTERM when PID dies.

Linux only.  In a process of its own because Python code between fork and exec of the parent
(preexec_fn) may deadlock; the kernel keeps the setting through exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Does not return."""
    parent, program, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != int(parent):  # it died before the kernel knew
        sys.exit(128 + signal.SIGTERM)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would keep that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(program, command)
    except OSError as error:
        sys.exit(f"Error: {program} cannot be run ({error.strerror}).")


if __name__ == "__main__":
    main()
