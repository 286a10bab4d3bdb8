"""Formats numbers, sizes, durations and tables for terminal output and Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.filesize import pick_unit_and_suffix

STREAMS_SHOWN = 3  # a mixture of more is shown as a range
_SECONDS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def or_dash(value: Any, form: Callable[[Any], str]) -> str:
    """`form(value)`, or `-` if `value` is not a number."""
    return form(value) if isinstance(value, int | float) else "-"


def count(number: int | float, digits: int = 1) -> str:
    """21300 -> 21.3k; numbers from 1000 on have `digits` decimals."""
    unit, suffix = pick_unit_and_suffix(int(number), ["", "k", "M", "G", "T"], 1000)
    return f"{number / unit:.{digits if suffix else 0}f}{suffix}"


def size(number: int | float, digits: int = 2) -> str:
    """Bytes in MiB, GiB or TiB: 2**31 -> 2.00 GiB."""
    mib = number / 2**20
    unit, suffix = pick_unit_and_suffix(int(mib), ["MiB", "GiB", "TiB"], 1024)
    return f"{mib / unit:.{digits}f} {suffix}"


def gib(number: int | float) -> str:
    """Bytes as GiB without the unit, for a column whose heading names it: 2**31 -> 2.0."""
    return f"{number / 2**30:.1f}"


def duration(seconds: int | float, units: int = 4) -> str:
    """4000 -> 1h06m40s; with `units` 2, the two largest units only: 1h06m; 3.14 -> 3.1s."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    left, parts = round(seconds), []
    for unit, length in _SECONDS:
        number, left = divmod(left, length)
        if parts or number:
            parts.append(f"{number:02d}{unit}" if parts else f"{number}{unit}")
    return "".join(parts[:units])


def epochs(read: Any) -> list[str]:
    """The epochs read of each stream, as a list of zero or one part of a log line.

    Args:
      read: stream -> epochs; an empty mapping, or any other value, gives no part.

    Returns:
      `epoch 0.12` for one stream, `epoch web 0.12 code 1.30` for a mixture, and
      `epoch 0.12 to 1.30` for one of more than STREAMS_SHOWN streams.
    """
    if not isinstance(read, Mapping) or not read:
        return []
    if len(read) > STREAMS_SHOWN:
        return [f"epoch {min(read.values()):.2f} to {max(read.values()):.2f}"]
    named = len(read) > 1
    return ["epoch " + " ".join(f"{k} {n:.2f}" if named else f"{n:.2f}" for k, n in read.items())]


def table(rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table with aligned columns; the first row is the heading.

    The first `left` columns are aligned left, the others right.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [rows[0], rule, *rows[1:]]
    )
