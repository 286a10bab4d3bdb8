"""Configs as plain values: dotted keys, saved files, renamed keys, declarations of keys."""

import dataclasses
import json
import typing
from collections.abc import Iterator

import pytest
from small_run import ROOT

from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.config import (
    Config,
    default_config,
    from_config_dict,
    option_fields,
    read_config,
    to_dict,
    to_flat_dict,
)
from moe_jax.data.config import MixtureEntry
from moe_jax.decides import Data, Decides, Weights, declared
from moe_jax.errors import UserError
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS


def test_dotted_keys_hold_every_value_of_a_config():
    """Setting them one by one in ml_collections gives the config that they were taken from."""
    data = dataclasses.replace(Config().data, mixture={"a": {"weight": 2.0}})
    config = dataclasses.replace(Config(seed=7), data=data)
    flat = to_flat_dict(config)
    assert flat["seed"] == 7 and flat["data.mixture.a.weight"] == 2.0
    assert "data.mixture" not in to_flat_dict(Config())
    found = default_config()
    found.data.mixture = {"a": {"weight": 0.0}}
    found.update_from_flattened_dict(flat)
    typed = from_config_dict(found)
    moe = dataclasses.replace(typed.model.moe, options={})  # default_config lists their defaults
    assert config == dataclasses.replace(typed, model=dataclasses.replace(typed.model, moe=moe))


def saved_with(**sections):
    """The default config as saved, with sections changed; a value of None removes its key."""
    plain = to_dict(Config())
    for name, values in sections.items():
        merged = plain[name] | values
        plain[name] = {key: value for key, value in merged.items() if value is not None}
    return plain


@pytest.mark.parametrize(
    ("batches", "batch_size", "rows"), [(16, 32, 512), (1, 4, 4), (0, 32, 0), (3, 10, 30)]
)
def test_a_saved_config_with_a_renamed_key_is_read(tmp_path, batches, batch_size, rows):
    plain = saved_with(eval={"batches": batches, "rows": None}, train={"batch_size": batch_size})
    (tmp_path / "config.json").write_text(json.dumps(plain))
    found = read_config(tmp_path / "config.json")
    assert to_dict(found) == saved_with(eval={"rows": rows}, train={"batch_size": batch_size})


@pytest.mark.parametrize("batches", [None, "2", [2], {"a": 1}, 2.5, 10**40, -1])
def test_a_renamed_key_with_garbage_is_one_sentence(tmp_path, batches):
    for train in ({}, {"train": 7}, {"train": {"batch_size": "x"}}):
        plain = {"eval": {"batches": batches}} | train
        (tmp_path / "config.json").write_text(json.dumps(plain))
        with pytest.raises(UserError, match="is damaged or of another version"):
            read_config(tmp_path / "config.json")


def test_a_renamed_key_in_a_flag_or_a_config_file_names_the_new_one(tmp_path):
    sentence = r"^config\.eval\.batches is now config\.eval\.rows \(.*\): set that instead\.$"
    tiny = f"--config={ROOT / 'configs' / 'tiny.py'}"
    with pytest.raises(UserError, match=sentence):
        parse(["data", tiny, "--config.eval.batches=4"], COMMANDS["data"])
    config = default_config()
    with config.unlocked():
        config.eval.batches = 4
    with pytest.raises(UserError, match=sentence):
        from_config_dict(config)


def undeclared(cls: type, path: str = "") -> Iterator[str]:
    """Yield the keys of a config dataclass whose type does not say what they decide."""
    hints = typing.get_type_hints(cls)
    for name, decides in declared(cls).items():
        if dataclasses.is_dataclass(hints[name]):
            yield from undeclared(typing.cast(type, hints[name]), f"{path}{name}.")
        elif decides is None:
            yield f"{path}{name}"


def test_every_key_says_what_it_decides():
    """Its type is Weights[...], Data[...], Training[...] or Run[...] (decides.py)."""
    assert [*undeclared(Config), *undeclared(MixtureEntry)] == []
    for name, fields in option_fields().items():
        kinds = declared((ROUTERS | DISPATCH)[name])
        assert [f"{name}.{field.name}" for field in fields if kinds[field.name] is None] == []


def test_a_key_without_a_declaration_is_found():
    @dataclasses.dataclass
    class Inner:
        seed: Data[int] = 0
        forgotten: float = 0.0

    @dataclasses.dataclass
    class Outer:
        width: Weights[int] = 1
        inner: Inner = dataclasses.field(default_factory=Inner)

    assert list(undeclared(Outer)) == ["inner.forgotten"]
    assert declared(Outer) == {"width": Decides.WEIGHTS, "inner": None}
