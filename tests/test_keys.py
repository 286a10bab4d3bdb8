"""The reference of config keys is complete, up to date, and states the bounds that are enforced."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from docstring_rules import value_faults

from moe_jax import bounds
from moe_jax.bounds import Choice, Limit, Rule, above, at_least, at_most, one_of, within
from moe_jax.cli.keys import page
from moe_jax.config import Config, default_config, option_fields
from moe_jax.data.config import DataConfig, MixtureEntry
from moe_jax.decides import Run
from moe_jax.errors import UserError
from moe_jax.keys import Key, sections
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS
from moe_jax.registry import dotted_keys

ROOT = Path(__file__).resolve().parents[1]
KEYS = {key.name: key for section in sections() for key in section.keys}


def test_the_page_is_up_to_date():
    """To update the page: python -m moe_jax.cli.keys > docs/configuration.md"""
    assert (ROOT / "docs" / "configuration.md").read_text() == page()


def test_every_key_is_there():
    groups = {section.name for section in sections()} | {"model.moe"}
    given = (key for key in KEYS.values() if key.type == "mapping" and key.default)
    mappings = {f"{key.name}." for key in given}
    names = set(dotted_keys(default_config().to_dict())) - groups
    known = {name for name in names if not any(map(name.startswith, mappings))}
    entries = {f"data.mixture.NAME.{field.name}" for field in dataclasses.fields(MixtureEntry)}
    assert set(KEYS) == known | entries


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_key_says_what_it_is(key: Key):
    assert list(value_faults(key.name, key.meaning, None, key.default)) == []
    assert key.decides and key.type in ("int", "float", "str", "bool", "mapping")
    # `a (why) | b`: a comment that lists names lists exactly those that the key accepts.
    said = re.findall(r"(?:^|[:|] ?)([a-z]\w*)(?: \([^)]*\))?(?= \||\.$)", key.meaning)
    if " | " in key.meaning:
        assert f"one of {', '.join(sorted(said))}" == sorted_names(key.constraint)


def sorted_names(constraint: str) -> str:
    """Sort the names of a constraint: `one of b, a` -> `one of a, b`."""
    return f"one of {', '.join(sorted(constraint.removeprefix('one of ').split(', ')))}"


class Field(typing.NamedTuple):
    """One field with a value, and the dataclass that declares it."""

    key: str
    cls: type
    name: str


def fields(cls: type, prefix: str) -> Iterator[Field]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if dataclasses.is_dataclass(hints[field.name]):
            inner = typing.cast(type, hints[field.name])
            yield from fields(inner, f"{prefix}{field.name}.")
        else:
            yield Field(f"{prefix}{field.name}", cls, field.name)


FIELDS = [*fields(Config, "")]
for _name, _own in option_fields().items():
    _kind = {**ROUTERS, **DISPATCH}[_name]
    FIELDS += [Field(f"model.moe.options.{_name}.{one.name}", _kind, one.name) for one in _own]


def refusal(field: Field, value: Any) -> str:
    """The error message of the dataclass for a value; "": the value is valid."""
    try:
        field.cls(**{field.name: value})
    except UserError as error:
        return str(error)
    return ""


# Test values per type; nearly every bound refuses some of them.
PROBES = {
    "int": (-7, -1, 0, 1, 2, 3, 2**33),
    "float": (-7.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2e6, float("nan")),
    "str": ("", "no such name"),
}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.key)
def test_what_a_key_refuses_is_what_it_says(field: Field):
    """A value is refused exactly if it violates the bounds on the page, which the message names.

    This finds a bound that is declared but not checked, and one that is checked but not declared.
    """
    marks = bounds.declared(field.cls)[field.name]
    more = field.key in TOGETHER or any(isinstance(mark, Rule) for mark in marks)
    for value in PROBES.get(KEYS[field.key].type, ()):
        sentence = refusal(field, value)
        expected = next((s for mark in marks if (s := mark.fault("KEY", value))), "")
        if expected:
            assert sentence.endswith(expected.removeprefix("KEY")) and field.name in sentence
        else:
            assert more or not sentence, value


# Keys that must also fit other keys of their section, with a value within their own bounds.
TOGETHER = {
    "mesh.fsdp": -1,  # at most one axis may take the rest, and by default `data` does
    "mesh.expert": -1,
    "mesh.tensor": -1,
    "model.num_heads": 3,
    "model.num_kv_heads": 3,
    "model.head_dim": 3,
    "model.moe.num_experts": 1,  # top_k is 2
    "optimizer.momentum": 0.0,  # adamw does not read it
    "train.accumulation": 3,
}
RULES = {
    "model.moe.top_k": 9,
    "train.profile_steps": "3:1",
    "model.moe.options.hash.table_size": 1,
    "model.moe.options.sigmoid_bias.expert_groups": 3,
    "model.moe.options.sigmoid_bias.top_groups": 2,
}


@pytest.mark.parametrize(("key", "value"), (TOGETHER | RULES).items())
def test_what_takes_several_keys_to_say_is_refused(key, value):
    (field,) = (field for field in FIELDS if field.key == key)
    assert field.name in refusal(field, value) or key.startswith("mesh.")


@pytest.mark.parametrize(
    ("bound", "taken", "refused", "sentence"),
    [
        (at_least(1), (1, 7), (0, -1, float("nan")), "k is 0: set 1 or more."),
        (above(0), (1e-9, 2), (0, -1, float("nan")), "k is 0: set it above 0."),
        (at_most(5), (5, -1), (6, float("nan")), "k is 6: set at most 5."),
        (within("[0, 1)"), (0, 0.99), (1, -0.01, float("nan")), "k is 1: set it in [0, 1)."),
        (within("(0, 1]"), (1, 0.01), (0, 1.01, float("nan")), "k is 0: set it in (0, 1]."),
        (one_of(["ab", "cd"]), ("ab",), ("abx", ""), "k 'abx' is unknown (did you mean 'ab'?)."),
        (
            Choice(lambda: ["ab"], "a path", lambda name: "/" in name),
            ("ab", "/"),
            ("b",),
            "k 'b' is unknown (did you mean 'ab'?): use one of these, or a path.",
        ),
    ],
)
def test_bounds(bound, taken, refused, sentence):
    assert [value for value in taken if bound.fault("k", value)] == []
    assert [value for value in refused if not bound.fault("k", value)] == []
    assert bound.fault("k", refused[0]) == sentence


def test_a_record_is_held_to_every_bound_of_its_fields():
    @dataclasses.dataclass
    class Sample:
        size: Run[Annotated[int, at_least(1), at_most(9)]] = 1
        free: Run[int] = 0

        def __post_init__(self):
            bounds.check(self, "sample.")

    assert [mark.text for mark in bounds.declared(Sample)["size"]] == ["1 or more", "at most 9"]
    Sample(9, -1)
    for size, sentence in {0: "sample.size is 0: set 1", 10: "sample.size is 10: set at"}.items():
        with pytest.raises(UserError, match=sentence):
            Sample(size)


def test_a_corpus_of_a_mixture_is_held_to_its_bounds():
    for key, value in {"weight": 0.0, "source": "sql"}.items():
        (mark,) = bounds.declared(MixtureEntry)[key]
        assert isinstance(mark, Limit | Choice)
        with pytest.raises(UserError) as error:
            DataConfig(mixture={"web": {key: value}})
        assert str(error.value) == mark.fault(f"data.mixture.web.{key}", value)


def test_named_corpora_take_the_place_of_name():
    names = [section.name for section in sections(["web", "code"])]
    assert {"data.mixture.web", "data.mixture.code"} < set(names)
    assert "data.mixture.NAME" not in names
