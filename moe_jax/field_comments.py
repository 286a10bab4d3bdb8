"""What the source says about each field of a class: the comment beside it, or else above it."""

import ast
import functools
import inspect
import io
import sys
import tokenize
from pathlib import Path


def field_comments(cls: type) -> dict[str, str]:
    """The comments of a class and of those that it inherits from.

    Args:
      cls: its annotated names are the fields.

    Returns:
      Field -> the comment on its lines, or else the lines of comment directly above, joined.  None
      of a class whose source is not there.
    """
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        found |= own_comments(owner)
    return found


def own_comments(cls: type) -> dict[str, str]:
    """As `field_comments`, without those of the classes that it inherits from."""
    file = _file(cls)
    if not file or not (node := definition(file, cls.__qualname__)):
        return {}
    comments, alone = _comments(file)
    found = {}
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
        text = [comments[line] for line in lines if line in comments]
        over = field.lineno - 1
        while over in alone:
            text.insert(0, comments[over])
            over -= 1
        if text:
            found[field.target.id] = " ".join(text)
    return found


def definition(file: str, qualname: str) -> ast.ClassDef | None:
    """Where a file defines a class; None where it does not, as it is made otherwise."""
    body = _parsed(file).body
    node = None
    for name in qualname.split("."):
        inner = [one for one in body if isinstance(one, ast.ClassDef) and one.name == name]
        if not inner:
            return None
        node, body = inner[-1], inner[-1].body  # the last definition of a name holds
    return node


def _file(cls: type) -> str:
    """The file that defines a class; "": there is none to read.

    A config file is run without a place in sys.modules, but its functions know where they stand.
    """
    module = sys.modules.get(cls.__module__)
    members = (getattr(member, "fget", member) for member in vars(cls).values())
    functions = filter(inspect.isfunction, members)
    names = [getattr(module, "__file__", None), *(f.__code__.co_filename for f in functions)]
    return next((name for name in names if name and Path(name).is_file()), "")


@functools.cache
def _source(file: str) -> str:
    with tokenize.open(file) as opened:
        return opened.read()


@functools.cache
def _parsed(file: str) -> ast.Module:
    return ast.parse(_source(file))


@functools.cache
def _comments(file: str) -> tuple[dict[int, str], set[int]]:
    """Line -> its comment; the lines that hold nothing else."""
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(_source(file)).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
            if token.line.strip() == token.string.strip():
                alone.add(token.start[0])
    return comments, alone
