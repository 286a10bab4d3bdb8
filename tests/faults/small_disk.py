"""A disk that runs full and folders that are read-only: for root as for others, in containers too.

The disk is a tmpfs in a mount namespace of its own, which goes with its holder.  Where the kernel
allows neither that nor one inside a user namespace, a limit on the size of the process's files
stands in: a write beyond it fails as well (EFBIG).
"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

# Becomes its arguments, without root's right to write what the modes of a folder forbid.
MODES_COUNT = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
if os.geteuid() == 0 and ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
    sys.exit("root's right to write everywhere cannot be dropped")
os.execv(sys.argv[1], sys.argv[1:])
"""
_HOLDER = """
import subprocess, sys
size, folder = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
print("mounted", flush=True)
sys.stdin.read()
"""
_NAMESPACES = (
    (["unshare", "--mount"], ["--mount"]),
    (
        ["unshare", "--user", "--map-root-user", "--mount"],
        ["--user", "--preserve-credentials", "--mount"],
    ),
)


class SmallDisk:
    """A context manager.

    Attributes:
      folder: where commands behind `prefix` see the disk.
      here: the same folder as this process sees it.
      prefix: goes in front of a command that is to see the disk.
      kind: "tmpfs" or "limit".
    """

    def __init__(self, folder: Path, size: int):
        folder.mkdir()
        self.folder = self.here = folder
        self.prefix: list[str] = []
        self.kind = "limit"
        self._holder: subprocess.Popen | None = None
        for enter, join in _NAMESPACES:
            command = [*enter, sys.executable, "-c", _HOLDER, str(size), str(folder)]
            holder = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert holder.stdout is not None
            if holder.stdout.readline() == "mounted\n":
                self.here = Path(f"/proc/{holder.pid}/root", *folder.parts[1:])
                self.prefix = ["nsenter", f"--target={holder.pid}", *join]
                self.kind, self._holder = "tmpfs", holder
                break
            holder.communicate()

    def __enter__(self) -> "SmallDisk":
        return self

    def __exit__(self, *_: object) -> None:
        if self._holder is not None:
            self._holder.communicate()  # closes its input, at which it ends

    def fill(self, process: subprocess.Popen, leave: int) -> None:
        """Leaves `leave` bytes; `process` is the one to be limited where there is no tmpfs."""
        if self.kind == "limit":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (leave, resource.RLIM_INFINITY))
            return
        process.send_signal(signal.SIGSTOP)  # what it writes meanwhile would be missing
        status = os.statvfs(self.here)
        with (self.here / "fill").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)
        process.send_signal(signal.SIGCONT)

    def make_room(self, process: subprocess.Popen) -> None:
        """Undoes `fill`."""
        if self.kind == "limit":
            if process.poll() is None:
                limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
            return
        (self.here / "fill").unlink()
