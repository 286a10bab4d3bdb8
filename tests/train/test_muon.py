"""Muon compared with the singular value decomposition of each matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn.params import ParamRule
from moe_jax.train.optim import Optimizer, OptimizerConfig

LAYERS, STEPS, MOMENTUM = 2, 3, 0.9
CONFIG = OptimizerConfig(
    "muon",
    learning_rate=1.0,
    momentum=MOMENTUM,
    weight_decay=0.0,
    schedule="constant",
    warmup_steps=0,
)
# Name -> rule and shape in one layer, and its matrices [inputs, outputs] in any fixed order.
HIDDEN = {
    "w_in_EDUF": (
        ParamRule("experts", ("experts", "expert_embed", "expert_matrices", "expert_mlp")),
        (3, 10, 2, 6),
        lambda w: [expert[:, u] for expert in w for u in range(2)],
    ),
    "w_out_EFD": (
        ParamRule("experts", ("experts", "expert_mlp", "expert_embed")),
        (3, 6, 10),
        list,
    ),
    "q_DHA": (
        ParamRule("attention", ("embed", "heads", "head_dim")),
        (10, 2, 3),
        lambda w: [w.reshape(10, 6)],
    ),
    "o_JAD": (
        ParamRule("attention", ("kv_heads", "head_dim", "embed")),
        (2, 3, 10),
        lambda w: [w.reshape(6, 10)],
    ),
    "router_DE": (ParamRule("router", ("embed", "router_experts")), (10, 4), lambda w: [w]),
}
OTHERS = {
    "embed_VD": (ParamRule("embedding", ("vocab", "embed")), (12, 10)),
    "head_DV": (ParamRule("head", ("embed", "vocab")), (10, 12)),
    "q_norm_HA": (ParamRule("norm", ("heads", "head_dim")), (2, 3)),
    "bias_EF": (ParamRule("experts", ("experts", "expert_mlp")), (3, 6)),
    "bias_D": (ParamRule("ffn", ("embed",)), (10,)),
}


def draw(seed, shapes):
    """Draw arrays; in w_* the scale differs by layer, by expert, and between gate and up.

    The test would then notice a norm over several matrices.  These axes have size 2 or 3.
    """
    rng, found = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        apart = [size if size <= 3 and name.startswith("w_") else 1 for size in shape]
        found[name] = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, apart)
    return found


def train(config, params, gradients, rules):
    """Parameters after one step per gradient, and the last state."""
    optimizer = Optimizer(config, 100)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params, rules)
    update = jax.jit(lambda g, s, w, step: optimizer.update(g, s, w, rules, step))
    for step, gradient in enumerate(gradients):
        params, state = update(gradient, state, params, jnp.int32(step))
    return params, state


def nesterov(history):
    """The momentum that the last step orthogonalises: a weighted mean of the gradients.

    It is correct up to a factor, which orthogonalising removes.
    """
    mean = np.zeros_like(history[0])
    for gradient in history:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gradient
    last = len(history)
    mean = mean / (1 - MOMENTUM ** (last + 1))
    return MOMENTUM * mean + (1 - MOMENTUM) * history[-1] / (1 - MOMENTUM**last)


@pytest.fixture(scope="module")
def trained():
    """(gradients, last update, state) of stacked layers; float64."""
    with jax.enable_x64(True):
        rules = {name: rule.stack() for name, (rule, *_) in HIDDEN.items()}
        shapes = {name: (LAYERS, *shape) for name, (_, shape, _) in HIDDEN.items()}
        gradients = [draw(seed, shapes) for seed in range(STEPS)]
        zero = {name: np.zeros(shape) for name, shape in shapes.items()}
        before, _ = train(CONFIG, zero, gradients[:-1], rules)
        after, state = train(CONFIG, zero, gradients, rules)
        return gradients, jax.tree.map(lambda a, b: np.asarray(b - a), before, after), state


@pytest.mark.parametrize("name", HIDDEN)
def test_each_matrix_of_each_expert_and_layer_is_orthogonalised_alone(trained, name):
    gradients, updates, _ = trained
    _, _, matrices = HIDDEN[name]
    for layer in range(LAYERS):
        histories = zip(*(matrices(tree[name][layer]) for tree in gradients), strict=True)
        for history, update in zip(histories, matrices(updates[name][layer]), strict=True):
            direction = -update / (0.2 * np.sqrt(max(update.shape)))
            left, size, right = np.linalg.svd(nesterov(history), full_matrices=False)
            assert size.min() > 0.003 * np.linalg.norm(size)  # smaller ones do not reach 1
            found = left.T @ direction @ right.T
            values = np.diag(found)
            assert ((values > 0.7) & (values < 1.2)).all(), values
            np.testing.assert_allclose(found, np.diag(values), atol=1e-9)
            # The update has no component outside the singular directions of the momentum.
            np.testing.assert_allclose(left @ found @ right, direction, atol=1e-9)


def test_its_state_is_one_momentum_of_the_parameter_s_shape_and_a_counter(trained):
    _, updates, state = trained
    for name, update in updates.items():
        shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state[name]))
        assert shapes == sorted([(LAYERS,), update.shape]), name


def test_all_else_changes_as_under_adamw(x64):
    rules = {name: rule for name, (rule, _) in OTHERS.items()}
    shapes = {name: shape for name, (_, shape) in OTHERS.items()}
    params, *gradients = (draw(seed, shapes) for seed in range(3))
    adamw = dataclasses.replace(CONFIG, name="adamw", momentum=OptimizerConfig.momentum)
    got, state = train(CONFIG, params, gradients, rules)
    expected, form = train(adamw, params, gradients, rules)
    assert jax.tree.structure(state) == jax.tree.structure(form)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, expected)


def test_a_matrix_without_gradient_stays(x64):
    """An example is the gradient of an expert that received no token."""
    rule, shape, _ = HIDDEN["w_out_EFD"]
    weights = draw(0, {"w": shape})
    got, _ = train(CONFIG, weights, [{"w": np.zeros(shape)}], {"w": rule})
    np.testing.assert_array_equal(got["w"], weights["w"])


def test_momentum_is_stored_in_the_moments_dtype():
    rule, shape, _ = HIDDEN["q_DHA"]
    half = dataclasses.replace(CONFIG, moment_dtype="bfloat16")
    weights = jax.tree.map(lambda x: x.astype(np.float32), draw(0, {"w": shape}))
    got, state = train(half, weights, [weights], {"w": rule})
    (momentum,) = (leaf for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert momentum.dtype == jnp.bfloat16 and got["w"].dtype == jnp.float32
