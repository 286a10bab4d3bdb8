"""Compares the fields that docs/metrics.md defines with the rows that a run wrote."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
AXES = ("expert", "position", "source")
CHOSEN = {"eval_loss_by_source.": "SOURCE", "epochs.": "STREAM"}


def documented(title: str) -> set[str]:
    """The fields in the tables under a heading, up to the next one of its level or above.

    Raises:
      AssertionError: there is no such heading, or a field lacks its unit, meaning or "when".
    """
    text = PAGE.read_text()
    level = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert level, f"{PAGE.name} has no heading {title!r}"
    below = re.split(rf"^#{{2,{len(level[1])}}} ", text[level.end() :], flags=re.MULTILINE)[0]
    found = set()
    for row in re.findall(r"^\| `.*\|$", below, re.MULTILINE):
        field, *said = (cell.strip() for cell in row.strip("|").split("|"))
        assert len(said) == 3 and all(said), row
        assert field.strip("`") not in found, f"{field} is defined twice"
        found.add(field.strip("`"))
    return found


def written(path: Path) -> list[set[str]]:
    """The fields of each row in a file of JSON lines, under their names on the page."""
    return [fields(json.loads(line)) for line in path.read_text().splitlines()]


def fields(row: Mapping[str, Any]) -> set[str]:
    """Dotted names of a row's fields; a user's names and axes are replaced as on the page."""
    return set(_names(row, ""))


def _names(row: Mapping[str, Any], above: str) -> Iterator[str]:
    for name, value in row.items():
        name = "AXIS" if not above and name in AXES else name
        name = CHOSEN.get(above, name)
        if isinstance(value, Mapping):
            yield from _names(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def differences(rows: Iterable[set[str]], title: str, seldom: Iterable[str] = ()) -> list[str]:
    """Compare the fields of rows with those that the page defines under `title`.

    Args:
      rows: the result of `written`.
      title: a heading of the page.
      seldom: fields that no row needs to have.
    """
    there, said = set().union(*rows), documented(title)
    missing = [f"{name} is not defined below {title!r}" for name in sorted(there - said)]
    never = [f"{name} is in no row" for name in sorted(said - there - set(seldom))]
    return missing + never
