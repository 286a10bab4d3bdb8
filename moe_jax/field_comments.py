"""Reads the comment on each field of a class from the source: beside the field, or above it."""

import ast
import functools
import inspect
import io
import sys
import tokenize
from pathlib import Path


def field_comments(cls: type) -> dict[str, str]:
    """The comments on the fields of a class and its base classes.

    Args:
      cls: a class; its annotated names are the fields.

    Returns:
      Field -> the comment on its lines, or else the joined comment lines directly above it.  A
      class without readable source has no comments.
    """
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        found |= own_comments(owner)
    return found


def own_comments(cls: type) -> dict[str, str]:
    """As `field_comments`, without those of base classes."""
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
    """The definition of a class in a file; None if the file does not define it."""
    body = _parsed(file).body
    node = None
    for name in qualname.split("."):
        inner = [one for one in body if isinstance(one, ast.ClassDef) and one.name == name]
        if not inner:
            return None
        node, body = inner[-1], inner[-1].body  # the last definition of a name wins
    return node


def _file(cls: type) -> str:
    """The file that defines a class; "" if there is no readable file.

    A config file is run without an entry in sys.modules, but its functions record their file.
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
    """(line -> its comment, the set of lines that contain only a comment)."""
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(_source(file)).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
            if token.line.strip() == token.string.strip():
                alone.add(token.start[0])
    return comments, alone
