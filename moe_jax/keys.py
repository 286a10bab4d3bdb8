"""Lists every config key with its type, default, what it decides, its meaning and its bounds.

All of it is read from the dataclasses, the only source; docs/configuration.md and --help print it
(cli/keys.py, cli/help.py).
"""

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from moe_jax import bounds, decides
from moe_jax.bounds import one_of
from moe_jax.config import TABLES, Config, option_fields
from moe_jax.data.config import MixtureEntry
from moe_jax.field_comments import field_comments
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS


class Key(NamedTuple):
    """One key of a config."""

    name: str  # dotted, such as train.steps
    type: str  # its name in Python; `mapping` for one with keys that the user chooses
    default: Any  # a plain value
    decides: str  # weights, data, training or run; "": not declared
    meaning: str  # the comment of its field; "": there is no comment
    constraint: str  # "": any value of its type


class Section(NamedTuple):
    """The keys of one dataclass, without those of dataclasses inside it."""

    name: str  # dotted, such as model.moe; "": the section of the top-level keys
    meaning: str  # one sentence
    keys: list[Key]


def sections(corpora: Iterable[str] = ("NAME",)) -> list[Section]:
    """All keys by section, including those of registered routers and dispatch paths.

    Args:
      corpora: names of the entries of `data.mixture`.
    """
    found = []
    for section in _below(Config, "", ""):
        found.append(section)
        if section.name == "model.moe":
            found.extend(_options())
        if section.name == "data":
            found.extend(_section(MixtureEntry, f"data.mixture.{corpus}") for corpus in corpora)
    return found


def _below(cls: type, name: str, meaning: str) -> Iterator[Section]:
    """Yield the section of a config dataclass, then those of the dataclasses in it."""
    yield _section(cls, name, meaning)
    hints, comments = typing.get_type_hints(cls), field_comments(cls)
    for field, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            inner = f"{name}.{field}" if name else field
            yield from _below(typing.cast(type, hint), inner, comments.get(field, ""))


def _options() -> Iterator[Section]:
    """Yield the sections of keys that belong to one router or dispatch path."""
    classes: dict[str, type] = {**ROUTERS, **DISPATCH}
    for name, fields in option_fields().items():
        own = {field.name for field in fields}
        yield _section(classes[name], f"model.moe.options.{name}", own=own)


def _section(cls: type, name: str, meaning: str = "", own: set[str] | None = None) -> Section:
    """The section of a dataclass's keys with plain values; `own`: only keys of these names."""
    hints, comments = typing.get_type_hints(cls), field_comments(cls)
    kinds, limits = decides.declared(cls), bounds.declared(cls)
    keys = []
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) or (own is not None and field.name not in own):
            continue
        dotted, kind = f"{name}.{field.name}" if name else field.name, kinds[field.name]
        marks = [*limits[field.name], *(one_of(TABLES[key]) for key in TABLES if key == dotted)]
        keys.append(
            Key(
                name=dotted,
                type=_type_name(hint),
                default=_default(field),
                decides=kind.value if kind else "",
                meaning=_sentence(comments.get(field.name, "")),
                constraint=" and ".join(mark.text for mark in marks),
            )
        )
    return Section(name, _sentence(meaning or _first_sentence(cls)), keys)


def _sentence(text: str) -> str:
    """Format a comment as a sentence: capitalised, except a formula's letter, with a full stop."""
    text = " ".join(text.split())
    text = text[:1].upper() + text[1:] if text[1:2].isalpha() else text
    return text if not text or text.endswith((".", ":")) else f"{text}."


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint) or hint
    name = getattr(origin, "__name__", str(origin))
    return "mapping" if name == "Mapping" else name


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _first_sentence(cls: type) -> str:
    """The first line of a class's own docstring; "" if it has none."""
    return inspect.cleandoc(vars(cls).get("__doc__") or "").split("\n")[0]
