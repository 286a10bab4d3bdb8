"""A small disk that can be filled, and read-only folders that bind root too, also in containers.

The disk is a tmpfs in its own mount namespace, which ends with the process that holds it.  If the
kernel allows this neither directly nor inside a user namespace, a limit on the size of a process's
files replaces it: a write beyond the limit fails as well (EFBIG).
"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

# Execs its arguments without root's capability to write where a folder's mode forbids it.
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
    """A context manager that holds the disk.

    Attributes:
      folder: path of the disk for commands with `prefix`.
      here: path of the same folder for this process.
      prefix: arguments to put in front of a command that uses the disk.
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
            self._holder.communicate()  # closes its stdin, and it ends

    def fill(self, process: subprocess.Popen, leave: int) -> None:
        """Fill the disk up to `leave` free bytes; without a tmpfs, limit the files of `process`."""
        if self.kind == "limit":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (leave, resource.RLIM_INFINITY))
            return
        process.send_signal(signal.SIGSTOP)  # its writes would change the free space meanwhile
        status = os.statvfs(self.here)
        with (self.here / "fill").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)
        process.send_signal(signal.SIGCONT)

    def make_room(self, process: subprocess.Popen) -> None:
        """Undo `fill`."""
        if self.kind == "limit":
            if process.poll() is None:
                limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
            return
        (self.here / "fill").unlink()
