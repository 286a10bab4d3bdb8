"""Every file under configs/ loads, and the named architectures have their published sizes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from moe_jax.config import Config, default_config, from_config_dict, from_json, to_json
from moe_jax.errors import UserError
from moe_jax.model.define import define
from moe_jax.model.flops import flops_per_token, param_counts
from moe_jax.run.resolve import resolve

CONFIGS = Path(__file__).parent.parent / "configs"
BYTES = 258
ARGUMENTS = {
    "tiny": ("", "dense"),
    "cpu_small": ("8", "32", "128", "dense"),
    "learning": ("dense", "e8k1", "e64k2"),
}
ALL = [
    (path.stem, arg)
    for path in sorted(CONFIGS.glob("*.py"))
    for arg in ARGUMENTS.get(path.stem, ("",))
]

# (total, active) parameters, embedding included; the totals are those of the released checkpoints.
PUBLISHED = {
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),  # "12.9B"
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280),  # "1.3B"
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704),  # "3.3B"
}


def load(name: str, arg: str = "") -> Config:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(arg))


def defined(model):
    return define(model, jnp.float32)


@pytest.mark.parametrize(("name", "arg"), ALL)
def test_builds(name, arg):
    config = load(name, arg)
    vocab = config.model.vocab_size or BYTES
    total, active = param_counts(defined(dataclasses.replace(config.model, vocab_size=vocab)))
    assert total >= active > 0
    assert (total == active) == config.model.dense


@pytest.mark.parametrize("name", sorted({name for name, _ in ALL}))
def test_resolved(name, golden):
    """The resolved config on 8 devices (bench_*: one) is a golden: no default changes unnoticed."""
    devices = 1 if name.startswith("bench_") else 8
    arguments = [arg for other, arg in ALL if other == name]
    resolved = {arg: resolve(load(name, arg), devices, BYTES)[0] for arg in arguments}
    golden(f"config_{name}", {arg: json.loads(to_json(c)) for arg, c in resolved.items()})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(UserError, match="takes"):
        load(name, "sparse")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    assert param_counts(defined(load(name).model)) == PUBLISHED[name]


def test_switch_c_by_hand():
    V, L, D, F, E, HA = 32128, 30, 2080, 6144, 2048, 32 * 64
    layer = 4 * D * HA + 2 * D + D * E  # attention, norms, router
    total = V * D + L * (layer + E * 2 * D * F) + D
    assert param_counts(defined(load("switch_c").model)) == (
        total,
        V * D + L * (layer + 2 * D * F) + D,
    )
    assert 1.565e12 < total < 1.575e12


def test_dense_twins_cost_the_same_per_token():
    """A sparse model needs more FLOPs per token than its dense twin only for the router."""
    for name, sparse in (("tiny", ""), ("cpu_small", "8")):
        twins = [
            dataclasses.replace(load(name, a).model, vocab_size=BYTES) for a in (sparse, "dense")
        ]
        moe, dense = (flops_per_token(defined(model), 128) for model in twins)
        router = 6 * twins[0].num_layers * twins[0].width * twins[0].moe.num_experts
        assert moe - dense == router


def test_flops_by_hand():
    model = load("mixtral_8x7b").model
    V, L, D, F, H, J, A, K, E, T = 32000, 32, 4096, 14336, 32, 8, 128, 2, 8, 4096
    matmul = V * D + L * (2 * D * H * A + 2 * D * J * A + K * 3 * D * F + D * E)
    causal = 3 * L * (2 * 2 * T * H * A) / 2
    assert flops_per_token(defined(model), T) == 6 * matmul + causal


@pytest.mark.parametrize("router", ["switch", "gshard", "soft", "sigmoid_bias"])
def test_one_expert_is_refused(router):
    """With one expert the softmax is 1 and the router gets no gradient; gshard needs two."""
    config = default_config()
    config.model.moe.update({"router": router, "num_experts": 1, "top_k": 1})
    config.model.moe.options.sigmoid_bias.renormalize = False
    sentence = rf"num_experts is 1: router {router} .* Set 2 or more"
    with pytest.raises(UserError, match=sentence):
        resolve(from_config_dict(config), 1, BYTES)
    config.model.dense = True
    resolve(from_config_dict(config), 1, BYTES)


def test_the_options_of_a_named_transformation_are_a_mapping_of_a_config_file():
    """A key set there has a type, like any other; a resolved config keeps all of them."""
    config = default_config()
    config.optimizer.name, config.optimizer.options = "optax.scale_by_lion", {"b1": 0.8}
    config.optimizer.options.mode = "smooth"
    typed = from_config_dict(config)
    assert typed.optimizer.options == {"b1": 0.8, "mode": "smooth"}
    assert from_json(to_json(typed)) == typed
    with pytest.raises(TypeError, match="b1"):
        config.optimizer.options.b1 = "high"


def test_factors_by_group_are_keys_and_may_be_given_for_some_groups():
    """Each factor is a flag as well; the resolved config has the factors of all groups."""
    config, other = default_config(), default_config()
    config.optimizer.rate_of.router = 0.1
    other.optimizer.rate_of = {"router": 0.1}
    typed = from_config_dict(config)
    assert typed == from_config_dict(other) == from_json(to_json(typed))
    assert typed.optimizer.rate_of["router"] == 0.1 and typed.optimizer.rate_of["head"] == 1
    everything = load("olmoe_1b_7b").optimizer
    assert set(everything.decay_of.values()) == {1.0} and everything.weight_decay == 0.1


def test_an_option_cannot_replace_a_key_of_all():
    """Otherwise priority "batch" would bypass the check that refuses it for next-token models."""
    config = default_config()
    config.model.moe.options.capacity = {"priority": "batch"}
    with pytest.raises(UserError, match="shares 'priority' with the others"):
        resolve(from_config_dict(config), 1, 258)
