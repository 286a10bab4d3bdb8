"""Splits long files into documents at boundaries of their own, always in the same way."""

from collections.abc import Callable, Iterator

PIECE = 8192  # characters after which a document ends at the next boundary


def split_entries(text: str) -> Iterator[str]:
    """Split a dictionary of dictd: a cut is before a headword, which begins at the margin."""
    return _split(text, lambda line: not line[0].isspace())


def split_metamath(text: str) -> Iterator[str]:
    """Split a Metamath database: a cut is before a comment outside every block and statement.

    Such a comment describes the theorem after it, or is the heading of a section.
    """
    return _split(text, _TopLevel())


def _split(text: str, begins: Callable[[str], bool]) -> Iterator[str]:
    """Cut before the first line that `begins` a part after every PIECE characters."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if begins(line) and size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)


class _TopLevel:
    """Reads Metamath line by line; true for a line with a comment at the top level."""

    def __init__(self):
        self._comment = self._statement = False
        self._blocks = 0

    def __call__(self, line: str) -> bool:
        top = not (self._comment or self._statement or self._blocks)
        if "$" in line:
            for token in line.split():
                self._read(token)
        return top and line.lstrip().startswith("$(")

    def _read(self, token: str) -> None:
        if self._comment:
            self._comment = token != "$)"
        elif token == "$(":
            self._comment = True
        elif token in ("${", "$}"):
            self._blocks += 1 if token == "${" else -1
        elif token == "$.":
            self._statement = False
        elif token in ("$p", "$a", "$e", "$f", "$c", "$v", "$d"):
            self._statement = True
