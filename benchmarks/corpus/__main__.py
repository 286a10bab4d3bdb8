"""Makes a text corpus of more than 1 GB, labelled by domain, from free packages of Debian 12.

    python -m benchmarks.corpus --out=DIR [--small] [--cache=DIR]

DIR/DOMAIN-00000.parquet ...: one domain per file, up to 64 MB of text each, zstd.  The columns are
`text`, `domain`, `path` (in the package) and `package` (name=version).  DIR/corpus.json has the
versions and SHA-256 of the packages, and documents, bytes and SHA-256 of the shards.
DIR/LICENSES.md has the licences, DIR/copyright/ the copyright file of each package.

Packages come through `apt-get download` into the cache (default: ~/.cache/moe_jax_corpus) and are
unpacked by `dpkg-deb`, without root rights.  A package that cannot be downloaded is named, and the
rest is built.  --small makes up to 20 MB from small packages (60 MB of downloads), for trials: of
each domain the documents with the smallest SHA-256, up to 1 MB.

The same versions of the packages give the same bytes of every shard.  corpus.json records the
versions of pyarrow, which is written into Parquet files and decides their encoding, and of Python,
whose HTML parser changes.

Left out and counted: documents under 200 bytes, exact duplicates, and files that are neither UTF-8
(up to one other byte in 10,000) nor what they declare.  A translation loses the lines that are
still English.  Long files are cut at boundaries of their own: Metamath databases before a theorem
or a section, dictionaries before a headword.

A mixture takes each domain by its files (docs/data.md):

    config.data.mixture = {
        "kernel_c": {"files": "DIR/kernel_c-*.parquet", "weight": 0.5},
        "proofs": {"files": "DIR/proofs-*.parquet", "weight": 0.1},
        ...
    }

It needs Debian 12 and pyarrow (extra `data`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.corpus.build import build
from benchmarks.corpus.sources import FULL, SMALL, SMALL_DOMAIN_BYTES
from benchmarks.jobs import end_with_children
from moe_jax.errors import UserError

CACHE = Path("~/.cache/moe_jax_corpus")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (None: those of the process); return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--small", action="store_true", help="up to 20 MB from small packages")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the packages")
    given = parser.parse_args(arguments)
    sources, limit = (SMALL, SMALL_DOMAIN_BYTES) if given.small else (FULL, 0)
    cache = given.cache.expanduser().absolute()
    try:
        build(sources, given.out.absolute(), cache, limit, lambda line: print(line, flush=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    end_with_children()  # an end by SIGTERM removes unfinished folders, too
    sys.exit(main())
