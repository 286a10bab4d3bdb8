"""Records that hold no text, and what is done about them: one policy for all kinds of files."""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files.json_files import replace_text

NAMED = 3  # bad records that are shown on the screen


class BadRecord(NamedTuple):
    """A record without text; a reader yields it in the text's place."""

    reason: str  # what the record is, such as "is null"
    advice: str  # what to change
    unit: str = ""  # line | row; empty: the file is the record
    number: int = 0  # of the line, from 1, or row, from 0

    @property
    def place(self) -> str:
        """` line 3` or ` row 7`, to follow the file's name; empty for the file."""
        return f" {self.unit} {self.number}" if self.unit else ""


class BadRecords:
    """The bad records of one stream.

    Args:
      policy: stop | skip.
      limit: records that may be left out.
      key: of the config, whose keys `bad_records` and `max_bad_records` they are.
    """

    def __init__(self, policy: str = "stop", limit: int = 0, key: str = "data"):
        self._policy, self._limit, self._key = policy, limit, key
        self._found: dict[tuple[str, str, int], str] = {}  # a build reads its files several times

    def __len__(self) -> int:
        return len(self._found)

    def add(self, path: epath.Path, record: BadRecord) -> None:
        """Notes a bad record of a file.

        Raises:
          UserError: the policy is `stop`, or there are more than the limit.
        """
        sentence = f"{path}{record.place} {record.reason}"
        if self._policy == "stop":
            raise UserError(f"{sentence}: {record.advice}, or set {self._key}.bad_records to skip.")
        self._found[os.fspath(path), record.unit, record.number] = record.reason
        if len(self._found) > self._limit:
            raise UserError(
                f"More than {self._limit:,} records cannot be read, the last of them {sentence}: "
                f"{record.advice}, or raise {self._key}.max_bad_records."
            )

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each: file, line or row unless the file is the record, reason."""
        return [
            {"file": file, **({unit: number} if unit else {}), "reason": reason}
            for (file, unit, number), reason in self._found.items()
        ]


def file_of(store: epath.Path) -> epath.Path:
    """The file beside a store that lists the bad records of its text."""
    return store.with_name(f"{store.name}.bad_records.jsonl")


def write(found: Iterable[BadRecords], store: epath.Path, say: Callable[[str], None]) -> None:
    """Writes the bad records beside a store, if there are any, and names the first ones.

    Args:
      found: of each stream.
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
        say(f"left out: {row['file']}{place} {row['reason']}")
    say(f"{len(rows):,} bad record{'s' * (len(rows) > 1)} left out, listed in {file_of(store)}")
