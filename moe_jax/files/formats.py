"""Tables for terminals and documents."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table, aligned; its first row is the heading, its first `left` columns flush left.

    The others are flush right.
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
