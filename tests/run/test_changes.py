"""Comparing configs: what a resumed run, or one that starts from other weights, reports."""

import dataclasses
import json

import pytest

from moe_jax.config import Config, from_config_dict, read_config, sealed_json, to_dict
from moe_jax.config_file import read_config_file
from moe_jax.decides import Decides
from moe_jax.errors import UserError
from moe_jax.run.changes import changes, lines
from moe_jax.run.resolve import resolve
from moe_jax.run.setup import resolve_config


def made(**overrides: object) -> Config:
    """configs/tiny.py with `model__moe__top_k=1` for model.moe.top_k."""
    config = read_config_file("configs/tiny.py")
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    config.update_from_flattened_dict(values)
    return from_config_dict(config)


def resolved(**overrides: object) -> Config:
    return resolve(made(**overrides), 1, 258).config


@pytest.fixture
def begun(tmp_path):
    """Make the workdir of a run that has begun with this config."""

    def begin(config: Config, name: str = "config.json"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / name).write_text(sealed_json(config))
        return tmp_path

    return begin


# Keys that change no shape.
REFUSED = {
    "model__rope_theta": (1e4, 5e5),
    "model__norm_eps": (1e-5, 1e-6),
    "model__moe__top_k": (2, 3),
    "model__moe__router": ("top_k", "sigmoid_bias"),
    "model__moe__every": (2, 4),
    "model__confine_attention": (False, True),
    "seed": (0, 1),
    "train__batch_size": (32, 64),
    "data__heldout_fraction": (0.05, 0.1),
    "model__moe__group_rows": (0, 1),
}
NAMED = {
    "optimizer__learning_rate": (2e-3, 1e-3),
    "eval__every": (100, 7),
    "model__moe__capacity_factor": (1.25, 2.0),
    "model__moe__dispatch": ("capacity", "dense"),
    "model__moe__options__top_k__jitter": (0.0, 0.1),
    "model__moe__options__top_k__renormalize": (True, False),
    "model__moe__options__dropless__recv_factor": (0.0, 2.0),  # a knob that is not in use
    "model__remat": ("none", "full"),
    "train__spike_factor": (100.0, 50.0),
    "checkpoint__keep_last": (3, 5),
    "data__source": ("stdlib", "text"),  # the store's fingerprint tells what was read
    "data__files": ("", "somewhere/*.txt"),
    "watchdog__step": (1800.0, 60.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_decides_weights_or_data_is_refused(begun, name):
    old, new = REFUSED[name]
    workdir = begun(resolved(**{name: old}))
    assert resolve_config(made(**{name: old}), workdir, 1).notes == []
    key = name.replace("__", ".")
    with pytest.raises(UserError, match=rf"config\.{key} is .* but the run in this workdir has"):
        resolve_config(made(**{name: new}), workdir, 1)


def test_every_refused_key_is_named_in_one_sentence(begun):
    workdir = begun(resolved())
    other = {"seed": 1, "model__rope_theta": 5e5, "train__batch_size": 64, "eval__every": 3}
    with pytest.raises(UserError) as error:
        resolve_config(made(**other), workdir, 1)
    assert str(error.value) == (
        "config.seed is 1 but the run in this workdir has 0, config.model.rope_theta is 500000.0 "
        "and was 10000.0, config.train.batch_size is 64 and was 32. Set the old value, or use a "
        "new --workdir."
    )


def test_every_other_changed_key_is_a_line(begun):
    workdir = begun(resolved(**{name: old for name, (old, _) in NAMED.items()}))
    notes = resolve_config(
        made(**{name: new for name, (_, new) in NAMED.items()}), workdir, 1
    ).notes
    said = [line for line in notes if " was " in line]
    expected = {f"{n.replace('__', '.')} was {a!r}, is {b!r}" for n, (a, b) in NAMED.items()}
    assert set(said) == expected and len(said) == len(expected)
    assert resolve_config(made(train__steps=300), begun(resolved()), 1).notes == [
        "train.steps was 200, is 300: the learning-rate schedule changes with it"
    ]


def test_a_key_that_an_older_config_does_not_have_is_its_default(begun):
    workdir = begun(resolved())
    plain = to_dict(resolved())
    del plain["model"]["moe"]["options"], plain["model"]["qk_norm"], plain["watchdog"]
    (workdir / "config.json").write_text(json.dumps(plain))
    assert resolve_config(made(), workdir, 1).notes == []
    assert resolve_config(made(eval__every=9, watchdog__step=5.0), workdir, 1).notes == [
        "eval.every was 100, is 9",
        "watchdog.step was 1800.0, is 5.0",
    ]


def test_a_mixture_keeps_names_and_weights_and_not_its_paths():
    def mixed(**entries: dict) -> Config:
        config = resolved()
        return dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=entries))

    old = mixed(a={"files": "x", "weight": 2.0}, b={"files": "y"})
    same = mixed(a={"files": "elsewhere", "weight": 2}, b={"files": "y", "source": ""})
    assert lines(changes(old, same), old, same) == ["data.mixture.a.files was 'x', is 'elsewhere'"]
    heavier = mixed(a={"files": "x", "weight": 3.0}, b={"files": "y"})
    assert [(c.key, c.old, c.new, c.decides) for c in changes(old, heavier)] == [
        ("data.mixture.a.weight", 2.0, 3.0, Decides.DATA)
    ]
    alone = changes(old, mixed(a={"files": "x", "weight": 2.0}))
    policy = ("bad_records", "max_bad_records")
    parts = ("source", "files", "field", "weight", "heldout_files", *policy)
    assert [change.key for change in alone] == [f"data.mixture.b.{part}" for part in parts]


def test_a_dense_model_has_no_experts_to_keep(begun):
    workdir = begun(resolved(model__dense=True))
    given = made(model__dense=True, model__moe__top_k=1, model__moe__options__hash__seed=3)
    assert resolve_config(given, workdir, 1).notes == [
        "model.moe.top_k was 2, is 1",
        "model.moe.options.hash.seed was 0, is 3",
    ]


def test_a_knob_that_is_the_router_itself_is_kept(begun):
    """The table of a hash router decides what its parameters would decide."""
    router = {"model__moe__router": "hash"}
    workdir = begun(resolved(**router))
    with pytest.raises(UserError, match=r"config\.model\.moe\.options\.hash\.seed is 1 but the"):
        resolve_config(made(**router, model__moe__options__hash__seed=1), workdir, 1)
    other = made(model__moe__options__hash__seed=1)
    notes = resolve_config(other, begun(resolved()), 1).notes
    assert notes == ["model.moe.options.hash.seed was 0, is 1"]


def test_any_flipped_bit_of_a_config_is_found(tmp_path):
    path = tmp_path / "config.json"
    good = sealed_json(resolved()).encode()
    path.write_bytes(good)
    config = read_config(path)
    assert config == resolved()
    refused = 0
    for place in range(0, len(good), 3):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        try:
            assert read_config(path) == config  # white space, or the case of a number's exponent
        except UserError:
            refused += 1
    assert refused > len(good) / 6
