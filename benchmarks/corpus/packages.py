"""Downloads Debian packages into a cache and unpacks them; no root rights are needed."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_jax.errors import UserError

Say = Callable[[str], None]
INTERVAL = 10  # seconds between lines of progress
PLAIN = {"LC_ALL": "C"}  # messages of the programs in English


class MissingPackageError(UserError):
    """A package that cannot be downloaded or unpacked; the message is the reason."""


class Package(NamedTuple):
    """A package in the cache."""

    name: str
    version: str
    file: Path
    sha256: str

    @property
    def label(self) -> str:
        """The value of the column `package`."""
        return f"{self.name}={self.version}"


class _Offer(NamedTuple):
    """The file that apt would download."""

    file: str
    size: int
    sha256: str  # empty: apt names another digest


def check_programs() -> None:
    """Raise UserError if this machine has no apt-get or no dpkg-deb."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not on this machine: run this on Debian 12 (bookworm), such as "
                f"the image debian:bookworm, and copy the result."
            )


def fetch(name: str, cache: Path, say: Say) -> Package:
    """Download a package unless the cache has it.

    Args:
      name: of the package.
      cache: an existing folder.
      say: takes lines of progress.

    Raises:
      MissingPackageError: apt does not know it or cannot download it.
    """
    offer = _ask(name, cache, say)
    file = cache / offer.file
    if not _is_offered(file, offer):
        say(f"{name}: downloading {offer.size / 1e6:.1f} MB")
        _run(["apt-get", "download", name], cache, say, f"{name}: downloading", file)
    if not _is_offered(file, offer):
        raise MissingPackageError(
            f"apt-get download did not write {offer.file} of {offer.size} bytes"
        )
    command = ["dpkg-deb", "--field", str(file), "Version"]
    version = _run(command, cache, say, f"{name}: reading the version").strip()
    return Package(name, version, file, _digest(file))


def unpack(package: Package, folder: Path, say: Say) -> None:
    """Unpack the files of a package; raises MissingPackageError if dpkg-deb cannot."""
    command = ["dpkg-deb", "--extract", str(package.file), str(folder)]
    _run(command, folder.parent, say, f"{package.name}: unpacking")


def read_copyright(tree: Path, name: str) -> str:
    """The copyright file in the unpacked tree of package `name`; empty: the tree has none."""
    file = tree / "usr/share/doc" / name / "copyright"
    inside = file.resolve().is_relative_to(tree.resolve())
    return file.read_text(encoding="utf-8", errors="replace") if inside and file.is_file() else ""


def licence_names(tree: Path, name: str) -> str:
    """Name the licences of an unpacked package as its copyright file does.

    Args:
      tree: the unpacked package.
      name: of the package.

    Returns:
      The fields `License:`, sorted, if the file has the machine-readable form of Debian; else the
      place to look at, with the files of /usr/share/common-licenses that it refers to.
    """
    text, folder = read_copyright(tree, name), tree / "usr/share/doc" / name
    if not text:
        return f"that of {folder.readlink().name}" if folder.is_symlink() else "not named"
    if re.search(r"^Format:", text, re.MULTILINE):
        fields = re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)
        return ", ".join(sorted({field.strip() for field in fields}))
    common = sorted(set(re.findall(r"/usr/share/common-licenses/([\w.-]*\w)", text)))
    refers = f" (refers to {', '.join(common)})" if common else ""
    return f"see copyright/{name}.txt{refers}"


def _ask(name: str, cache: Path, say: Say) -> _Offer:
    command = ["apt-get", "download", "--print-uris", name]
    # In an empty folder, because apt prints nothing if the file is in the current one.
    with tempfile.TemporaryDirectory(prefix="empty-", dir=cache) as empty:
        answer = _run(command, Path(empty), say, f"{name}: asking apt")
    found = re.search(r"^'[^']*' (\S+) (\d+)(?: SHA256:(\w+))?", answer, re.MULTILINE)
    if found is None or "/" in found[1]:
        raise MissingPackageError("apt-get download --print-uris names no file")
    return _Offer(found[1], int(found[2]), found[3] or "")


def _is_offered(file: Path, offer: _Offer) -> bool:
    if not file.is_file() or file.stat().st_size != offer.size:
        return False
    return not offer.sha256 or _digest(file) == offer.sha256


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _run(
    command: Sequence[str], folder: Path, say: Say, what: str, growing: Path | None = None
) -> str:
    """Run a program in a folder, with a line of progress per INTERVAL; return what it printed."""
    pipe, seconds = subprocess.PIPE, 0
    with subprocess.Popen(
        command, cwd=folder, env=os.environ | PLAIN, text=True, stdout=pipe, stderr=pipe
    ) as process:
        while True:
            try:
                out, err = process.communicate(timeout=INTERVAL)
                break
            except subprocess.TimeoutExpired:
                seconds += INTERVAL
                size = growing.stat().st_size if growing is not None and growing.exists() else 0
                say(f"{what}: {seconds} s" + (f", {size / 1e6:.1f} MB" if size else ""))
            except BaseException:
                process.kill()
                raise
    if process.returncode:
        raise MissingPackageError(_reason(err) or f"{command[0]} ended with {process.returncode}")
    return out


def _reason(errors: str) -> str:
    """The last line of an error, without the mark of apt before it and the full stop."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1].removeprefix("E: ").rstrip(".") if lines else ""
