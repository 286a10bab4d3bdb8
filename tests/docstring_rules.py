"""Rules for docstrings of public names; each yields a sentence per missing part.

A docstring has the sections `Args:` and `Attributes:` with an entry per name (`name: text`, or
`a, b: text` for several), `Returns:`, `Raises:` and `Reference:`.
"""

import ast
import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_jax.field_comments import own_comments

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Reference):[ ]?(.*)")
ENTRY = re.compile(r"  (\w+(?:, \w+)*): (.*)")
PACKAGE = "moe_jax"
CONSTRUCTORS = ("__init__", "__post_init__")


def sections(text: str) -> dict[str, str]:
    """Split a docstring: name of a section -> its text.  A line that is not indented ends it."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = SECTION.fullmatch(line)
        if header:
            lines = found.setdefault(header[1], [header[2]])
        elif line and not line.startswith(" "):
            lines = []
        else:
            lines.append(line)
    return {name: "\n".join(lines).strip("\n") for name, lines in found.items()}


def entries(section: str) -> dict[str, str]:
    """Parse the entries of a section: name -> its text."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        entry = ENTRY.fullmatch(line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith("    "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def value_faults(what: str, text: str | None, hint: Any, default: Any) -> Iterator[str]:
    """Yield what the text about one parameter or field lacks."""
    if text is None:
        yield f"{what} is not documented"
        return
    if len(re.findall(r"\w+", text)) < 2:
        yield f"{what} is documented by less than two words"
    optional = default is None or type(None) in typing.get_args(hint)
    if optional and not re.search(r"\bNone\b", text):
        yield f"{what} does not say what None means"
    if type(default) in (int, float) and default == 0 and not re.search(r"\b0\b", text):
        yield f"{what} does not say what 0 means"


def function_faults(what: str, function: Any, owner: type | None = None) -> Iterator[str]:
    """Yield what the docstring of a function or method lacks."""
    found = sections_of(function)
    yield from sentence_faults(what, function)
    yield from parameter_faults(what, function, entries(found.get("Args", "")))
    returns = inspect.signature(function).return_annotation
    if returns not in (None, "None") and not found.get("Returns"):
        yield f"{what} has no Returns"
    if raises_user_error(function, owner) and not says_user_error(found):
        yield f"{what} has no Raises with UserError"


def says_user_error(found: dict[str, str]) -> bool:
    """True if the section Raises names the mistakes that raise UserError."""
    return re.search(r"UserError: \S", found.get("Raises", "")) is not None


def sentence_faults(what: str, found: Any) -> Iterator[str]:
    """Yield a fault unless the docstring begins with a sentence."""
    if not re.match(r"(?s)\S.{3,}?[.:](\s|$)", found.__doc__ or ""):
        yield f"{what} has no sentence that says what it is"


def parameter_faults(what: str, function: Any, said: dict[str, str]) -> Iterator[str]:
    """Yield the differences between the entries of Args and the parameters."""
    parameters = inspect.signature(function).parameters
    taken = {name: p for name, p in parameters.items() if name not in ("self", "cls")}
    hints = hints_of(function)
    for name, parameter in taken.items():
        hint = hints.get(name)
        yield from value_faults(f"{what}: {name}", said.get(name), hint, parameter.default)
    yield from (f"{what} has no parameter {name}" for name in said if name not in taken)


def class_faults(what: str, cls: type, contract: type | None = None) -> Iterator[str]:
    """Yield what a class, its fields or constructor and its own public methods lack.

    A method of the protocol `contract` needs only a sentence: the rest is in the protocol.
    """
    found = sections_of(cls)
    yield from sentence_faults(what, cls)
    if is_record(cls):
        yield from field_faults(what, cls)
    elif "__init__" in vars(cls):
        init = inspect.unwrap(vars(cls)["__init__"])
        both = {**entries(found.get("Args", "")), **entries(sections_of(init).get("Args", ""))}
        yield from parameter_faults(what, init, both)
        found |= sections_of(init)
    makers = [vars(cls)[name] for name in CONSTRUCTORS if name in vars(cls)]
    fails = any(raises_user_error(inspect.unwrap(maker), cls) for maker in makers)
    if fails and not says_user_error(found):
        yield f"{what} has no Raises with UserError"
    for name, member in vars(cls).items():
        if name.startswith("_") and name != "__call__":
            continue
        where = f"{what}.{name}"
        by_contract = contract is not None and name in vars(contract)
        is_property = isinstance(member, property | functools.cached_property)
        if is_property or (by_contract and callable(member)):
            yield from sentence_faults(where, member)
        elif isinstance(member, classmethod | staticmethod):
            yield from function_faults(where, inspect.unwrap(member.__func__), cls)
        elif inspect.isfunction(inspect.unwrap(member)):
            yield from function_faults(where, inspect.unwrap(member), cls)


def sections_of(found: Any) -> dict[str, str]:
    return sections(inspect.cleandoc(found.__doc__ or ""))


def is_record(cls: type) -> bool:
    """True if its annotations are its fields: a dataclass, a NamedTuple or a protocol."""
    is_protocol = getattr(cls, "_is_protocol", False)
    return dataclasses.is_dataclass(cls) or hasattr(cls, "_fields") or is_protocol


def field_faults(what: str, cls: type) -> Iterator[str]:
    """Yield the fields, also inherited ones, that neither Attributes nor a comment documents."""
    hints, said = {}, {}
    for owner in filter(is_ours, reversed(cls.__mro__)):
        found = sections_of(owner)
        hints |= inspect.get_annotations(owner)
        listed = entries(found.get("Args", "")) | entries(found.get("Attributes", ""))
        said |= own_comments(owner) | listed
        absent = [name for name in listed if name not in hints and not hasattr(cls, name)]
        yield from (f"{what} has no field {name}" for name in absent)
    defaults = getattr(cls, "_field_defaults", {})
    if dataclasses.is_dataclass(cls):
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name in (name for name in hints if not name.startswith("_")):
        hint = hints_of(cls).get(name, hints[name])
        default = defaults.get(name, dataclasses.MISSING)
        yield from value_faults(f"{what}: {name}", said.get(name), hint, default)


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse(Path(sys.modules[module].__file__ or "").read_text())


def definition(found: Any) -> ast.AST | None:
    """The syntax tree of a function or class; None for a generated one, such as a dataclass's."""
    node: Any = parsed(found.__module__)
    for name in found.__qualname__.split("."):
        inner = [one for one in node.body if getattr(one, "name", "") == name]
        if not inner:
            return None
        node = inner[0]
    return node


def hints_of(found: Any) -> dict[str, Any]:
    """The annotations; unresolved if a name in them is imported only for type checkers."""
    try:
        return typing.get_type_hints(found)
    except NameError:
        return inspect.get_annotations(found)


def raises_user_error(function: Any, owner: type | None, seen: set[Any] | None = None) -> bool:
    """True if it, or a function of the package that it calls by name, has `raise UserError`."""
    seen = set() if seen is None else seen
    function = inspect.unwrap(function)
    if function in seen or not inspect.isfunction(function):
        return False
    seen.add(function)
    for node in ast.walk(definition(function) or ast.Module([], [])):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            made = resolved(node.exc.func, function, owner)
            returned = hints_of(made).get("return") if inspect.isfunction(made) else made
            if getattr(returned, "__name__", "") == "UserError":
                return True
        if isinstance(node, ast.Call):
            callee = resolved(node.func, function, owner)
            inner = owner
            if inspect.isclass(callee):
                inner = callee
            for one in called(callee):
                if raises_user_error(one, inner, seen):
                    return True
    return False


def called(callee: Any) -> list[Any]:
    """The functions of the package that calling it runs."""
    if inspect.isclass(callee):
        makers = [getattr(callee, name, None) for name in CONSTRUCTORS]
        return [maker for maker in makers if is_ours(maker)]
    return [callee] if is_ours(callee) else []


def is_ours(found: Any) -> bool:
    return (getattr(found, "__module__", None) or "").partition(".")[0] == PACKAGE


def resolved(node: ast.expr, function: Any, owner: type | None) -> Any:
    """The object that `name`, `module.name` or `self.name` means inside a function."""
    if isinstance(node, ast.Name):
        return owner if node.id == "cls" else vars(sys.modules[function.__module__]).get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id in ("self", "cls"):
            return getattr(owner, node.attr, None)
        holder = vars(sys.modules[function.__module__]).get(node.value.id)
        if isinstance(holder, types.ModuleType) or inspect.isclass(holder):
            return getattr(holder, node.attr, None)
    return None


def named_by(functions: Iterable[Any], public: Iterable[type]) -> set[type]:
    """The package's classes in the signatures of functions, and in the fields of these classes.

    Args:
      functions: the functions whose annotations are searched.
      public: known classes, which are left out and whose fields are not searched.
    """
    found, public = set(), set(public)
    waiting = [hint for function in functions for hint in hints_of(function).values()]
    while waiting:
        hint = waiting.pop()
        if inspect.isclass(hint) and is_ours(hint) and hint not in found | public:
            found.add(hint)
            waiting.extend(hints_of(hint).values() if is_record(hint) else ())
        for inner in typing.get_args(hint):
            waiting.extend(inner if isinstance(inner, list) else [inner])
    return found


def methods(cls: type) -> list[Any]:
    """The public methods that the class itself defines."""
    names = [name for name in vars(cls) if not name.startswith("_") or name == "__call__"]
    found = [inspect.unwrap(getattr(cls, name)) for name in names if callable(getattr(cls, name))]
    return [getattr(one, "__func__", one) for one in found]


def reference_faults(what: str, found: Any) -> Iterator[str]:
    """Yield a fault unless the docstring cites a paper, by arXiv number or by authors and year."""
    if not re.search(
        r"arXiv \d{4}\.\d{5}|, (19|20)\d\d\b", sections_of(found).get("Reference", "")
    ):
        yield f"{what} has no Reference"
