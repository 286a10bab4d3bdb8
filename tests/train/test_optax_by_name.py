"""Named optax transformations compared with plain optax on the whole tree, and refused names."""

import functools
import inspect
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.model.define import define
from moe_jax.moe.config import MoEConfig
from moe_jax.nn.params import ParamRule
from moe_jax.train.optax_by_name import check_options, check_parameter, directions, find
from moe_jax.train.optim import Optimizer, OptimizerConfig
from moe_jax.train.state import init_train_state, state_shardings

LAYERS, STEPS, RATE, DECAY = 3, 4, 0.01, 0.1
RULES = {
    "w_DF": ParamRule("ffn", ("embed", "mlp")),
    "scale_D": ParamRule("norm", ("embed",)),
}
SHAPES = {"w_DF": (4, 6), "scale_D": (4,)}
MATRICES = {str(layer): {"w_DF": True, "scale_D": False} for layer in range(LAYERS)}

# name -> options, weight decay, and the equivalent plain optax at a constant rate.
SAME = {
    "optax.scale_by_lion": (
        {"b1": 0.8, "b2": 0.9},
        DECAY,
        optax.lion(RATE, 0.8, 0.9, weight_decay=DECAY, mask=MATRICES),
    ),
    "optax.adamw": (
        {"b2": 0.95},
        DECAY,
        optax.adamw(RATE, b2=0.95, weight_decay=DECAY, mask=MATRICES),
    ),
    "optax.sgd": ({"momentum": 0.9, "nesterov": True}, 0.0, optax.sgd(RATE, 0.9, True)),
    # These use norms of a whole matrix, which must be those of one layer, not of the stack.
    "optax.lamb": ({}, 0.0, optax.lamb(RATE)),
    "optax.contrib.ademamix": ({"alpha": 4.0}, 0.0, optax.contrib.ademamix(RATE, alpha=4.0)),
}


def draw(seed):
    """Unrolled layers of growing scale, so that the test would notice a norm over all of them."""
    rng = np.random.default_rng(seed)
    return {
        str(layer): {name: 10.0**layer * rng.normal(size=shape) for name, shape in SHAPES.items()}
        for layer in range(LAYERS)
    }


def stacked(tree):
    return jax.tree.map(lambda *layers: jnp.stack(layers), *tree.values())


@pytest.mark.parametrize("name", SAME)
def test_stacked_layers_change_as_under_plain_optax_on_the_whole_tree(x64, name):
    options, decay, plain = SAME[name]
    config = OptimizerConfig(
        name, options, RATE, weight_decay=decay, schedule="constant", warmup_steps=0
    )
    rules = {leaf: rule.stack() for leaf, rule in RULES.items()}
    optimizer = Optimizer(config, STEPS)
    expected = jax.tree.map(jnp.asarray, draw(0))
    got = stacked(expected)
    state, plain_state = optimizer.init(got, rules), plain.init(expected)
    for step in range(STEPS):
        gradients = draw(step + 1)
        got, state = optimizer.update(stacked(gradients), state, got, rules, jnp.int32(step))
        updates, plain_state = plain.update(gradients, plain_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, stacked(expected))


def test_state_is_sharded_like_the_parameter_it_mirrors(mesh_of):
    """On 4 devices; counters are replicated."""
    moe = MoEConfig(num_experts=4, expert_width=16, group_rows=1)
    config = ModelConfig(
        vocab_size=64,
        num_layers=2,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        scan_layers=True,
        moe=moe,
    )
    model, mesh = define(config, jnp.float32), mesh_of(fsdp=2, expert=2)
    optimizer = Optimizer(OptimizerConfig("optax.scale_by_lion"), 100)
    where = state_shardings(model, optimizer, mesh)
    state = init_train_state(model, optimizer, mesh, jax.random.key(0))
    split = 0
    for param, place, own in zip(
        jax.tree.leaves(state.params),
        jax.tree.leaves(where.params),
        jax.tree.structure(state.params).flatten_up_to(state.optimizer),
        strict=True,
    ):
        moments = [leaf for leaf in jax.tree.leaves(own) if leaf.shape == param.shape]
        counters = [leaf for leaf in jax.tree.leaves(own) if leaf.shape != param.shape]
        assert len(moments) == len(counters) == 1
        assert moments[0].sharding.is_equivalent_to(place, param.ndim)
        assert counters[0].sharding.is_fully_replicated
        split += not place.is_fully_replicated
    assert split > 5


ARGUMENTS = {"max_delta", "threshold", "clipping", "max_norm", "decay", "step_size", "eta", "gamma"}


def functions():
    """The public optax functions annotated to make a transformation, with required arguments."""
    for prefix, module in (("optax", optax), ("optax.contrib", optax.contrib)):
        for name, value in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(value):
                continue
            signature = inspect.signature(value)
            if "GradientTransformation" in str(signature.return_annotation):
                required = (p for p in signature.parameters.values() if p.default is p.empty)
                yield f"{prefix}.{name}", {p.name for p in required}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Specifying a key")
def test_all_of_optax_is_refused_in_a_sentence_or_leads_downhill():
    """For a constant gradient; a transformation with the opposite sign would raise the loss."""
    weight, gradient = jnp.ones((2, 3)), jnp.asarray([[1.0, -2.0, 0.5], [3.0, 0.1, -1.0]])
    accepted = set()
    for name, required in functions():
        options = dict.fromkeys(required & ARGUMENTS, 0.5)
        try:
            check_options(name, options)
            check_parameter(name, options, "w", jax.ShapeDtypeStruct((2, 3), jnp.float32))
        except UserError as error:
            assert str(error).startswith("config.optimizer.") and str(error).endswith((".", ")")), (
                name
            )
            continue
        rule = optax.chain(*directions(name, options))
        state, total = rule.init(weight), 0.0
        for _ in range(3):
            direction, state = rule.update(gradient, state, weight)
            total += float((direction * gradient).sum())
        assert total >= 0, name
        accepted.add(name)
    assert len(accepted) > 40
    assert {"optax.scale_by_adan", "optax.scale_by_lion", "optax.sgd", "optax.adam"} <= accepted


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("torch.optim.Adam", {}, "begins with optax"),
        ("optax.scale_by_lyon", {}, "did you mean 'scale_by_lion'"),
        ("optax.contrib", {}, "a module of optax"),
        ("optax._src.transform.scale_by_lion", {}, "has no '_src'"),
        ("optax.jax.jit", {}, "has no 'jax'"),
        ("optax.scale_by_lion.__globals__", {}, "has no '__globals__'"),
        ("optax.GradientTransformation", {}, "has no 'GradientTransformation'"),
        ("optax.contrib.scale_by_cocob", {}, "expects updates"),
        ("optax.scale_by_lion", {"b3": 0.9}, r"options\.b3 is not an argument of .* \(did you"),
        ("optax.clip", {}, r"Set optimizer\.options\.max_delta"),
        ("optax.sgd", {"learning_rate": 0.1}, r"set optimizer\.learning_rate"),
        ("optax.adafactor", {"weight_decay_rate": 0.1}, r"optimizer\.weight_decay\.$"),
        ("optax.adamw", {"mask": True}, r"options\.mask is set: other keys decide it"),
        ("optax.scale_by_adam", {"mu_dtype": jnp.bfloat16}, "give numbers, strings"),
        ("optax.contrib.prodigy", {"betas": (0.9, 0.99)}, "give numbers, strings"),
        ("optax.scale_by_adam", {"eps": float("nan")}, "give numbers, strings"),
    ],
)
def test_names_and_options_that_a_config_refuses(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        OptimizerConfig(name, options)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("optax.scale_by_lbfgs", {}, r"w_DF \[4, 6\] it keeps state of shape \[10, 4, 6\]"),
        ("optax.scale_by_sm3", {}, r"state of shape \[4\], which is neither"),
        ("optax.contrib.muon", {}, r"state of shape \[3\], which is neither.*, adafactor or muon"),
        ("optax.noisy_sgd", {"seed": 1}, "state of type key"),
        ("optax.clip_by_global_norm", {"max_norm": 1.0}, "may depend on other parameters"),
        ("optax.contrib.prodigy", {}, "may depend on other parameters"),
        ("optax.contrib.schedule_free_sgd", {}, "keeps the learning rate in its state"),
        ("optax.polyak_sgd", {}, "keyword-only argument: 'value'"),
        ("optax.scale_by_lion", {"b1": "high"}, "it fails .*TypeError"),
        ("optax.scale_by_adam", {"mu_dtype": "float17"}, "failed .*float17"),
        ("optax.chain", {}, "the call with .* failed"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformations_that_training_cannot_use(name, options, sentence):
    """The message names the parameter and its shape within one layer, whether or not stacked."""
    for rule, shape in ((RULES["w_DF"], (4, 6)), (RULES["w_DF"].stack(), (LAYERS, 4, 6))):
        with pytest.raises(UserError, match=sentence) as error:
            params = {"w_DF": jax.ShapeDtypeStruct(shape, jnp.float32)}
            optimizer = Optimizer(OptimizerConfig(name, options, warmup_steps=0), STEPS)
            jax.eval_shape(functools.partial(optimizer.init, rules={"w_DF": rule}), params)
        assert f"optimizer.name is {name!r}" in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "optax.global_norm",
        "optax.losses.l2_loss",
        "optax.cosine_decay_schedule",
        "optax.update_moment",  # without annotations
        "optax.inject_hyperparams",  # returns a function that makes a transformation
        "optax.tree_utils.tree_zeros_like",
    ],
)
def test_what_makes_no_transformation_is_not_asked_for_arguments(name):
    for options in ({}, {"updates": 1.0}):
        with pytest.raises(UserError, match="which makes no gradient transformation"):
            OptimizerConfig(name, options)


@pytest.mark.parametrize("name", ["optax.lookahead", "optax.masked", "optax.stateless"])
def test_arguments_that_only_code_makes_are_not_asked_for(name):
    with pytest.raises(UserError, match="is a function or a transformation, which a config cannot"):
        OptimizerConfig(name)


def test_functions_without_annotations_that_make_one_are_found():
    assert find("optax.contrib.dog") is optax.contrib.dog
    assert find("optax.scale_by_factored_rms") is optax.scale_by_factored_rms


def test_what_optax_only_imports_is_not_found(monkeypatch):
    """Otherwise a config could call any function of the modules that optax imports."""
    assert find("optax.transforms.trace") is optax.transforms.trace
    monkeypatch.setattr(optax.contrib, "subprocess", subprocess, raising=False)
    monkeypatch.setattr(optax.contrib, "run", subprocess.run, raising=False)
    for name in ("optax.contrib.subprocess.run", "optax.contrib.run"):
        with pytest.raises(UserError, match="optax has no "):
            find(name)
