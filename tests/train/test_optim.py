"""Optimizers compared with explicit arithmetic in NumPy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.errors import UserError
from moe_jax.nn.params import ParamRule
from moe_jax.train.optim import Optimizer, OptimizerConfig

CONFIG = OptimizerConfig(
    learning_rate=0.01,
    b1=0.9,
    b2=0.95,
    weight_decay=0.1,
    schedule="constant",
    warmup_steps=2,
)
# Names must not matter: the matrix is called a norm, and the norm weight of rank 2 is not.
SHAPES = {"norm_DF": (6, 8), "scale": {"weight_D": (6,)}, "bias_F": (8,), "q_HA": (2, 4)}
RULES = {
    "norm_DF": ParamRule("ffn", ("embed", "mlp")),
    "scale": {"weight_D": ParamRule("norm", ("embed",))},
    "bias_F": ParamRule("ffn", ("mlp",)),
    "q_HA": ParamRule("norm", ("heads", "head_dim")),
}


def is_shape(leaf):
    return isinstance(leaf, tuple)


def draw(seed, shapes=SHAPES):
    """Draw float64 arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=is_shape)


def run(config, params, gradients, dtype="float64", rules=RULES, frozen=()):
    """Parameters and optimizer state after one update per gradient."""
    optimizer = Optimizer(config, 100, frozen=frozen)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    state = optimizer.init(params, rules)
    for step, gradient in enumerate(gradients):
        gradient = jax.tree.map(lambda x: jnp.asarray(x, dtype), gradient)
        params, state = optimizer.update(gradient, state, params, rules, jnp.int32(step))
    return params, state


# Config values -> factors on (learning rate, weight decay) of each parameter.  A bias has the
# learning-rate factor of its group and the weight-decay factor of norms.
FACTORS = {
    "default": ({}, {"norm_DF": (1, 1), "scale": (1, 0), "bias_F": (1, 0), "q_HA": (1, 0)}),
    "by group": (
        {"rate_of": {"ffn": 0.5}, "decay_of": {"norm": 0.25, "ffn": 2}},
        {"norm_DF": (0.5, 2), "scale": (1, 0.25), "bias_F": (0.5, 0.25), "q_HA": (1, 0.25)},
    ),
    "embeddings are others": (
        {"rate_of": {"embedding": 0}, "decay_of": {"embedding": 0, "norm": 1}},
        {"norm_DF": (1, 1), "scale": (1, 1), "bias_F": (1, 1), "q_HA": (1, 1)},
    ),
}


@pytest.mark.parametrize("case", FACTORS)
def test_adamw(x64, case):
    given, factors = FACTORS[case]
    params, gradients = draw(0), [draw(seed) for seed in range(1, 6)]
    got, _ = run(dataclasses.replace(CONFIG, **given), params, gradients)

    def oracle(path, w, *history):
        rate_factor, decay_factor = factors[path[0].key]
        decay = CONFIG.weight_decay * decay_factor
        m = v = np.zeros_like(w)
        for t, g in enumerate(history, 1):
            rate = rate_factor * CONFIG.learning_rate * min(1.0, t / CONFIG.warmup_steps)
            m = CONFIG.b1 * m + (1 - CONFIG.b1) * g
            v = CONFIG.b2 * v + (1 - CONFIG.b2) * g * g
            m_hat, v_hat = m / (1 - CONFIG.b1**t), v / (1 - CONFIG.b2**t)
            w = w - rate * (m_hat / (np.sqrt(v_hat) + CONFIG.eps) + decay * w)
        return w

    expected = jax.tree_util.tree_map_with_path(oracle, params, *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, expected)


def test_frozen_groups_never_change(x64):
    """Their moments do not change either; the other groups change."""
    params, gradients = draw(0), [draw(seed) for seed in range(1, 4)]
    got, state = run(
        dataclasses.replace(CONFIG, warmup_steps=0), params, gradients, frozen=("norm",)
    )
    for name in ("scale", "q_HA"):
        jax.tree.map(np.testing.assert_array_equal, got[name], params[name])
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(state[name]))
    for name in ("norm_DF", "bias_F"):
        assert np.all(np.asarray(got[name]) != params[name])


# w_DF is a matrix in each layer; bias_D has rank 2 only where layers are stacked.
LAYER_RULES = {"w_DF": ParamRule("ffn", ("embed", "mlp")), "bias_D": ParamRule("ffn", ("embed",))}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_stacked_layers_are_updated_like_unrolled_ones(x64, name):
    """Adafactor and Muon use whole matrices: norms, factored moments, singular values."""
    layers, shapes = 3, {"w_DF": (128, 130), "bias_D": (6,)}  # optax factors from 128 on
    config = dataclasses.replace(CONFIG, name=name, warmup_steps=0)
    trees = [[draw(10 * step + layer, shapes) for layer in range(layers)] for step in range(4)]
    # Scales differ between layers, so the test would notice a norm or an RMS over all of them.
    trees = [
        [jax.tree.map(lambda x, k=10.0**layer: k * x, tree) for layer, tree in enumerate(step)]
        for step in trees
    ]
    unrolled = [{str(layer): tree for layer, tree in enumerate(step)} for step in trees]
    stacked = [jax.tree.map(lambda *xs: np.stack(xs), *step) for step in trees]
    rules = {str(layer): LAYER_RULES for layer in range(layers)}
    apart, _ = run(config, unrolled[0], unrolled[1:], rules=rules)
    rules = {leaf: rule.stack() for leaf, rule in LAYER_RULES.items()}
    together, _ = run(config, stacked[0], stacked[1:], rules=rules)
    for layer in range(layers):
        for leaf in shapes:
            np.testing.assert_allclose(together[leaf][layer], apart[str(layer)][leaf], rtol=1e-12)


EXPERT_RULES = {
    "w_in_EDUF": ParamRule("experts", ("experts", "expert_embed", "expert_matrices", "expert_mlp")),
    "w_out_EFD": ParamRule("experts", ("experts", "expert_mlp", "expert_embed")),
    "bias_EF": ParamRule("experts", ("experts", "expert_mlp")),
}
# optax factors from 128 on.
LARGE = {"w_in_EDUF": (3, 130, 2, 128), "w_out_EFD": (3, 128, 130), "bias_EF": (3, 6)}
SMALL = {"w_in_EDUF": (3, 5, 2, 4), "w_out_EFD": (3, 4, 5), "bias_EF": (3, 4)}
# name -> what optax does to one matrix
WHOLE_MATRIX = {
    "adafactor": optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    ),
    "optax.lamb": optax.chain(optax.lamb(1.0), optax.scale(-1.0)),
    "optax.scale_by_trust_ratio": optax.scale_by_trust_ratio(),
}


def matrices(name, array):
    """Every matrix of an array of experts, in a fixed order."""
    if name == "w_in_EDUF":
        return [expert[:, u] for expert in array for u in range(array.shape[2])]
    return list(array)


@pytest.mark.parametrize("name", WHOLE_MATRIX)
@pytest.mark.parametrize(
    ("shapes", "layers"),
    [
        pytest.param(LARGE, 2, id="large"),
        pytest.param(SMALL, 0, id="small", marks=pytest.mark.full),
    ],
)
def test_every_matrix_of_every_expert_is_its_own(x64, name, shapes, layers):
    """Compared with optax on each matrix separately; `layers` are stacked, 0: unrolled."""

    def tree(seed):
        """Scales differ by expert and between gate and up; the test would notice a common mean."""
        arrays = draw(seed, {key: (max(1, layers), *shape) for key, shape in shapes.items()})
        for key, array in arrays.items():
            array *= np.logspace(-3, 1, array.shape[1]).reshape(1, -1, *[1] * (array.ndim - 2))
            if key == "w_in_EDUF":
                array[:, :, :, 1] *= 30
        return arrays

    params, *gradients = (tree(seed) for seed in range(4))
    flat = (lambda t: t) if layers else (lambda t: {key: array[0] for key, array in t.items()})
    rules = {key: rule.stack() if layers else rule for key, rule in EXPERT_RULES.items()}
    config = OptimizerConfig(
        name, learning_rate=0.01, schedule="constant", warmup_steps=0, weight_decay=0.0
    )
    got, _ = run(config, flat(params), [flat(g) for g in gradients], rules=rules)
    rule, apply = WHOLE_MATRIX[name], jax.jit(WHOLE_MATRIX[name].update)
    for key in shapes:
        found = got[key] if layers else got[key][None]
        for layer in range(max(1, layers)):
            history = [matrices(key, tree[key][layer]) for tree in (params, *gradients)]
            for matrix, mine in zip(
                zip(*history, strict=True), matrices(key, found[layer]), strict=True
            ):
                w, state = jnp.asarray(matrix[0]), rule.init(jnp.asarray(matrix[0]))
                for gradient in matrix[1:]:
                    direction, state = apply(jnp.asarray(gradient), state, w)
                    w = w - 0.01 * direction
                np.testing.assert_allclose(mine, w, rtol=1e-9, atol=1e-12)


def state_shapes(name, rule, shape):
    """The state shapes of one parameter, by leaf name; computes nothing."""
    optimizer = Optimizer(OptimizerConfig(name), 100)
    param = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(lambda w: optimizer.init({"w": w}, {"w": rule}), param)
    return [leaf.shape for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("name", ["adamw", "optax.adamw", "optax.scale_by_lion", "optax.lamb"])
def test_rules_without_factors_keep_one_form_of_state(name):
    """Moments of the parameter's shape and one counter, as in checkpoints of earlier runs."""
    rule, shape = EXPERT_RULES["w_in_EDUF"], (3, 5, 2, 4)
    assert set(state_shapes(name, rule, shape)) == {(), shape}
    assert set(state_shapes(name, rule.stack(), (6, *shape))) == {(6,), (6, *shape)}


def test_factors_stand_by_expert_then_matrix():
    rule = EXPERT_RULES["w_in_EDUF"]
    rows, columns = (3, 2, 128), (3, 2, 256)
    assert {rows, columns} < set(state_shapes("adafactor", rule, (3, 128, 2, 256)))
    stacked = set(state_shapes("adafactor", rule.stack(), (6, 3, 128, 2, 256)))
    assert {(6, *rows), (6, *columns)} < stacked


def test_a_scalar_that_depends_on_gradients_is_one_for_each_matrix():
    """It is not shared between gate and up, or between experts."""

    def init(params):
        return jnp.zeros(())

    def update(updates, state, params=None):
        state = jnp.maximum(state, jnp.abs(updates).max())
        return updates / state, state

    largest = optax.GradientTransformation(init, update)
    optimizer = Optimizer(
        OptimizerConfig(schedule="constant", warmup_steps=0, learning_rate=1.0, weight_decay=0.0),
        10,
        transformation=largest,
    )
    rules = {"w": EXPERT_RULES["w_in_EDUF"]}
    params = {"w": jnp.zeros((3, 5, 2, 4))}
    gradient = jnp.asarray(draw(0, {"w": (3, 5, 2, 4)})["w"], jnp.float32)
    state = optimizer.init(params, rules)
    got, state = optimizer.update({"w": gradient}, state, params, rules, jnp.int32(0))
    most = np.abs(gradient).max((1, 3))
    np.testing.assert_allclose(jax.tree.leaves(state)[0], most, rtol=1e-6)
    np.testing.assert_allclose(got["w"], -gradient / most[:, None, :, None], rtol=1e-6)


def test_adafactor_is_factored():
    shape = (256, 128)
    _, state = run(
        dataclasses.replace(CONFIG, name="adafactor"),
        {"w_DF": np.ones(shape)},
        [{"w_DF": np.ones(shape)}],
        "float32",
        {"w_DF": LAYER_RULES["w_DF"]},
    )
    largest = max(leaf.size for leaf in jax.tree.leaves(state))
    assert largest == max(shape)


def test_bfloat16_moments():
    params, gradients = draw(0), [draw(seed) for seed in range(1, 4)]
    config = dataclasses.replace(CONFIG, warmup_steps=0)
    exact, _ = run(config, params, gradients, "float32")
    half = dataclasses.replace(config, moment_dtype="bfloat16")
    got, state = run(half, params, gradients, "float32")
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(params))
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("bfloat16")}
    for new, reference in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        assert new.dtype == jnp.float32
        # Three steps of 0.01, each with an error of a few times 2**-8, the precision of bfloat16.
        np.testing.assert_allclose(new, reference, rtol=0, atol=3 * 0.01 * 4 / 256)
        assert np.any(np.asarray(new) != np.asarray(reference))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "adam"}, "adamw.*or a dotted name such as optax"),
        ({"options": {"b1": 0.8}}, r"adamw does not use it. Set its own keys"),
        ({"name": "optax.sgd", "b1": 0.8}, r"b1 is 0\.8: optax\.sgd does not use it"),
        ({"name": "optax.sgd", "moment_dtype": "bfloat16"}, "Set the default 'param'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"moment_dtype": "float16"}, "moment_dtype"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"b2": 1.0}, r"\[0, 1\)"),
        ({"name": "muon", "momentum": 1.0}, r"momentum is 1\.0: set it in \[0, 1\)"),
        ({"momentum": 0.9}, r"momentum is 0\.9: adamw does not use it\. .* 0\.95, or use muon"),
        ({"decay_share": 0.0}, "decay_share"),
        ({"decay_share": 1.01}, "decay_share"),
        ({"final_share": 1.5}, r"final_share is 1\.5: set it in \[0, 1\]"),
        ({"final_share": -0.1}, "final_share"),
        ({"warmup_steps": -1}, "warmup_steps"),
        (
            {"rate_of": {"roter": 0.1}},
            r"rate_of\.roter .*did you mean 'router'.*Use attention, emb",
        ),
        ({"decay_of": {"bias": 1.0}}, r"decay_of\.bias .*there is no group 'bias'"),
        ({"decay_of": {"norm": -1.0}}, r"decay_of\.norm is -1\.0\. Set a number >= 0"),
        ({"rate_of": {"router": True}}, r"rate_of\.router is True\. Set a number"),
        ({"rate_of": {"router": "high"}}, r"rate_of\.router is 'high'\. Set a number"),
    ],
)
def test_bad_values(change, sentence):
    with pytest.raises(UserError, match=sentence):
        OptimizerConfig(**change)
