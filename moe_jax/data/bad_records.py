"""Records that hold no text: one policy for all kinds of files."""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files.json_files import replace_text

NAMED = 3  # bad records that the log names


class BadRecord(NamedTuple):
    """A record without text; a reader yields it in place of the text."""

    reason: str  # follows the record's name in a sentence, such as "is null"
    advice: str  # in the imperative, such as "fix or remove it"
    unit: str = ""  # line | row; empty: the file is the record
    number: int = 0  # of the line, from 1, or row, from 0

    @property
    def place(self) -> str:
        """The suffix ` line 3` or ` row 7` of the file's name; empty if the file is the record."""
        return f" {self.unit} {self.number}" if self.unit else ""


class BadRecords:
    """Collects the bad records of one stream, or stops at the first.

    Args:
      policy: stop | skip.
      limit: records that may be skipped.
      key: section of the config whose `bad_records` and `max_bad_records` apply, for errors.
    """

    def __init__(self, policy: str = "stop", limit: int = 0, key: str = "data"):
        self._policy, self._limit, self._key = policy, limit, key
        # Keyed by file and record, because a build reads its files several times.
        self._found: dict[tuple[str, str, int], str] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, path: epath.Path, record: BadRecord) -> None:
        """Add a bad record of a file.

        Raises:
          UserError: the policy is `stop`, or the limit is exceeded.
        """
        sentence = f"{path}{record.place} {record.reason}"
        if self._policy == "stop":
            raise UserError(f"{sentence}: {record.advice}, or set {self._key}.bad_records to skip.")
        self._found[os.fspath(path), record.unit, record.number] = record.reason
        if len(self._found) > self._limit:
            raise UserError(
                f"{sentence}, after {self._limit:,} other bad records: {record.advice}, or raise "
                f"{self._key}.max_bad_records."
            )

    def rows(self) -> list[dict[str, Any]]:
        """The records as dicts: file, line or row (absent if the file is the record), reason."""
        return [
            {"file": file, **({unit: number} if unit else {}), "reason": reason}
            for (file, unit, number), reason in self._found.items()
        ]


def file_of(store: epath.Path) -> epath.Path:
    """The file beside a store that lists its bad records."""
    return store.with_name(f"{store.name}.bad_records.jsonl")


def write(found: Iterable[BadRecords], store: epath.Path, say: Callable[[str], None]) -> None:
    """Write the bad records, if any, to a file beside a store, and log the first ones.

    Args:
      found: the bad records of each stream.
      store: folder of the store.
      say: called with lines for the log.

    Raises:
      OSError: the file cannot be written.
    """
    rows = [row for one in found for row in one.rows()]
    if not rows:
        return
    replace_text(file_of(store), "".join(json.dumps(row) + "\n" for row in rows))
    for row in rows[:NAMED]:
        place = "".join(f" {unit} {row[unit]}" for unit in ("line", "row") if unit in row)
        say(f"bad record skipped: {row['file']}{place} {row['reason']}")
    say(f"{len(rows):,} bad record{'s' * (len(rows) > 1)} skipped, listed in {file_of(store)}")
