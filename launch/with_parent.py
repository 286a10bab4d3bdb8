"""python with_parent.py PID PROGRAM COMMAND...: execs COMMAND, which gets SIGTERM when PID dies.

Linux only.  This is a program of its own because Python code that the parent runs between fork and
exec (preexec_fn) may deadlock.  The kernel keeps the setting across exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Replace this process by COMMAND; does not return."""
    parent, program, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != int(parent):  # it died before prctl took effect
        sys.exit(128 + signal.SIGTERM)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and exec keeps that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(program, command)
    except OSError as error:
        sys.exit(f"Error: {program} cannot be run ({error.strerror}).")


if __name__ == "__main__":
    main()
