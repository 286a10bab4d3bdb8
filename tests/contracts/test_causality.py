"""Tokens after position t never change an output at or before t, not even by one bit."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.model.define import define
from moe_jax.model.forward import forward
from moe_jax.model.initialize import init
from moe_jax.moe.config import PRIORITIES, MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.dispatch_types import DispatchIn, LayerSizes
from moe_jax.moe.experts import Experts
from moe_jax.moe.layer import MoE
from moe_jax.moe.types import MoEContext, TokenChoice

B, T, D, E = 8, 16, 16, 8
ROWS = 4  # per group: several rows share its slots


def config(dispatch: str, priority: str) -> ModelConfig:
    """A model of two MoE layers with a capacity at which most experts overflow."""
    moe = MoEConfig(
        num_experts=E,
        expert_width=12,
        router="top_k",
        top_k=3,
        dispatch=dispatch,
        priority=priority,
        capacity_factor=0.6,
    )
    return ModelConfig(
        vocab_size=50,
        num_layers=2,
        width=D,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        ffn_width=16,
        moe=moe,
    )


def context(mesh) -> MoEContext:
    return MoEContext(
        token_ids_BT=jnp.zeros((B, T), jnp.int32),
        mask_BT=jnp.ones((B, T), bool),
        row_keys_B=jax.random.split(jax.random.key(1), B),
        mesh=mesh,
        group_rows=ROWS,
        train=True,
    )


def one_layer(config: ModelConfig, mesh):
    """The functions seed -> x_BTD, and x_BTD -> (y_BTD, aux) of one layer."""
    layer = MoE(
        config.moe,
        config.width,
        activation=config.activation,
        depth=config.num_layers,
        dtype=jnp.float32,
        rngs=nnx.Rngs(params=0),
    )
    graph, state = nnx.split(layer)
    kernel = np.random.default_rng(0).normal(size=(D, E)).astype(np.float32)
    state["router_kernel"].set_value(jnp.asarray(kernel))

    @jax.jit
    def run(x_BTD):
        return nnx.merge(graph, state)(x_BTD, context(mesh))

    return lambda seed: jax.random.normal(jax.random.key(seed), (B, T, D)), run


def whole_model(config: ModelConfig, mesh):
    """The functions seed -> tokens_BT, and tokens_BT -> (hidden_BTD, aux) of the model."""
    model = define(config, jnp.float32)
    params = jax.jit(functools.partial(init, model))(jax.random.key(0))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = jnp.ones((B, T), jnp.int32)

    @jax.jit
    def run(tokens_BT):
        return forward(model, params, tokens_BT, positions, segments, context(mesh))

    return lambda seed: jax.random.randint(jax.random.key(seed), (B, T), 0, 50), run


def leaks(make, config: ModelConfig, mesh) -> int:
    """The number of outputs before t that change with tokens from t on, over several t."""
    inputs, run = make(config, mesh)
    before, after = inputs(2), inputs(3)
    y, aux = run(before)
    if config.moe.dispatch in ("capacity", "einsum"):
        assert (aux.stats.outcomes.dropped_capacity > 0.2 * aux.stats.assignments).all()
    changed = 0
    for t in (1, T // 2, T - 1):
        later, _ = run(before.at[:, t:].set(after[:, t:]))
        differs_BT = (np.asarray(later) != np.asarray(y)).any(-1)
        changed += int(differs_BT[:, :t].sum())
        assert t > 1 or differs_BT[:, t:].sum() > B  # later outputs did change
    return changed


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_a_layer_is_causal_with_token_priority(dispatch, mesh_of):
    assert leaks(one_layer, config(dispatch, "token"), mesh_of()) == 0


@pytest.mark.parametrize("dispatch", ["capacity", "einsum"])
@pytest.mark.parametrize("priority", ["choice", "batch"])
def test_other_priorities_are_not(dispatch, priority, mesh_of):
    """The control: a later token's assignment evicts an earlier token's."""
    assert leaks(one_layer, config(dispatch, priority), mesh_of()) > 10


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_the_whole_model_is_causal(dispatch, mesh_of):
    assert leaks(whole_model, config(dispatch, "token"), mesh_of()) == 0


def test_the_whole_model_with_choice_priority_is_not(mesh_of):
    assert leaks(whole_model, config("capacity", "choice"), mesh_of()) > 10


def test_the_whole_model_with_batch_priority_is_refused(mesh_of):
    with pytest.raises(UserError, match="Set priority token"):
        whole_model(config("capacity", "batch"), mesh_of())


# Sizes for a dispatch path alone: groups, rows per group, positions, experts, choices.
GROUPS, GROUP_ROWS, POSITIONS, EXPERTS, CHOICES = 8, 2, 8, 8, 2
TOKENS = GROUP_ROWS * POSITIONS
# Values of every knob that affects drops, by field; a path without the field ignores them.
DROP_KNOBS = {
    "priority": [*PRIORITIES],
    "recv_factor": [0.0, 1.0, 1.25, 2.0],
    "capacity_factor": [0.6],
}
PATHS = [
    (name, dict(zip(knobs, values, strict=True)))
    for name, path in DISPATCH.items()
    for knobs in [[f.name for f in dataclasses.fields(path) if f.name in DROP_KNOBS]]
    for values in itertools.product(*(DROP_KNOBS[knob] for knob in knobs))
]
PATH_MESHES = [{}, {"expert": 2}, {"expert": 4}, {"data": 2, "expert": 2, "tensor": 2}]


class Drawn(NamedTuple):
    """Tokens with their choices; `real_GS` is False for padding."""

    x_GSD: Any
    choice: TokenChoice
    real_GS: Any


def draw(seed: int, choices: int) -> Drawn:
    """Draw tokens, most of which choose experts of the first shard, mostly the lowest ids."""
    rng = np.random.default_rng(seed)
    scores_GSE = rng.normal(size=(GROUPS, TOKENS, EXPERTS)) + np.linspace(3, -3, EXPERTS)
    ids_GSK = np.argsort(-scores_GSE, axis=-1)[..., :choices].astype(np.int32)
    shape = ids_GSK.shape
    choice = TokenChoice(
        ids_GSK, rng.uniform(0.1, 1, shape).astype(np.float32), rng.uniform(size=shape) < 0.9
    )
    x_GSD = rng.normal(size=(GROUPS, TOKENS, D)).astype(np.float32)
    return Drawn(x_GSD, choice, rng.uniform(size=(GROUPS, TOKENS)) < 0.95)


def path_alone(dispatch, mesh, train: bool):
    """The function Drawn -> (y_GSD, kept_GSK) of a dispatch path on `mesh`."""
    w_in, w_out = (
        0.3 * jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(EXPERTS, D, 2, 12), (EXPERTS, 12, D)])
    )

    @jax.jit
    def run(drawn: Drawn):
        inputs = DispatchIn(drawn.real_GS, GROUP_ROWS, train, mesh)
        return dispatch(drawn.x_GSD, drawn.choice, Experts(w_in, w_out, "swiglu"), inputs)

    return run


def moved(dispatch, mesh, train: bool = True, choices: int = CHOICES) -> tuple[int, int, int]:
    """Count the changes before t if everything from t on is redrawn, over several t.

    Returns the number of assignments whose outcome changed, the number of tokens whose output
    changed, and the number of real tokens' assignments that were dropped before the change.
    """
    run = path_alone(dispatch, mesh, train)
    before, after = draw(0, choices), draw(1, choices)
    y_GSD, kept_GSK = run(before)
    wanted_GSK = before.choice.valid_GSK & before.real_GS[..., None]
    position_S = np.arange(TOKENS) % POSITIONS
    outcomes = outputs = 0
    for t in range(1, POSITIONS):
        later_S = position_S >= t
        mixed = jax.tree.map(
            lambda a, b, later_S=later_S: np.where(
                later_S.reshape(1, -1, *[1] * (a.ndim - 2)), b, a
            ),
            before,
            after,
        )
        later_y, later_kept = run(mixed)
        outcomes += int((later_kept != kept_GSK)[:, ~later_S].sum())
        outputs += int((np.asarray(later_y) != np.asarray(y_GSD)).any(-1)[:, ~later_S].sum())
        assert (np.asarray(later_y) != np.asarray(y_GSD)).any(-1)[:, later_S].any()
    return outcomes, outputs, int((wanted_GSK & ~np.asarray(kept_GSK)).sum())


def sizes_of(mesh, choices: int = CHOICES) -> LayerSizes:
    """The LayerSizes of `path_alone`."""
    devices = mesh.shape["data"] * mesh.shape["expert"]
    shards = mesh.shape["expert"]
    return LayerSizes(GROUPS * TOKENS // devices, TOKENS, choices, EXPERTS, shards)


def assert_as_announced(dispatch, mesh, **how) -> int:
    """Assert that the past changes only if `lookahead` names a knob; return the drops."""
    outcomes, outputs, dropped = moved(dispatch, mesh, **how)
    sizes = sizes_of(mesh, how.get("choices", CHOICES))
    if dispatch.lookahead(sizes):
        assert outcomes > 0 and outputs > 0
    else:
        assert (outcomes, outputs) == (0, 0)
    return dropped


def label(value) -> str:
    """The test id of a path with its knobs, or of a mesh."""
    name, knobs = value if isinstance(value, tuple) else ("", value)
    return "-".join([name, *(f"{key}_{knob}" for key, knob in knobs.items())]).strip("-") or "one"


@pytest.mark.parametrize("sizes", PATH_MESHES, ids=label)
@pytest.mark.parametrize("path", PATHS, ids=label)
def test_what_a_path_announces_is_what_it_does(path, sizes, mesh_of):
    name, knobs = path
    dispatch, mesh = DISPATCH[name](**knobs), mesh_of(**sizes)
    dropped = assert_as_announced(dispatch, mesh)
    overflows = dispatch.capacity(TOKENS, CHOICES, EXPERTS, train=True) is not None
    if knobs.get("recv_factor", 0) > 0:  # the first shard has most of the load
        overflows = mesh.shape["expert"] > 1 and knobs["recv_factor"] < mesh.shape["expert"]
    assert (dropped > 20) == overflows


@pytest.mark.parametrize("name", DISPATCH)
def test_one_choice_is_causal_under_choice_priority(name, mesh_of):
    """With K = 1 there are only first choices."""
    path = DISPATCH[name]
    if "priority" in {field.name for field in dataclasses.fields(path)}:
        path = functools.partial(path, priority="choice", capacity_factor=0.6)
    assert_as_announced(path(), mesh_of(expert=2), choices=1)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_packed_rows_are_as_causal_as_slots(priority, mesh_of, monkeypatch):
    """The fast path of `capacity`, which GPUs run on one expert shard."""
    monkeypatch.setattr(Experts, "has_grouped_kernel", lambda self, rows: True)
    dispatch = DISPATCH["capacity"](capacity_factor=1.0, priority=priority)
    assert assert_as_announced(dispatch, mesh_of(data=2)) > 20


@pytest.mark.parametrize("name", DISPATCH)
def test_paths_are_causal_in_evaluation(name, mesh_of):
    """Evaluation uses `eval_capacity_factor`."""
    path = DISPATCH[name]
    if "eval_capacity_factor" in {field.name for field in dataclasses.fields(path)}:
        path = functools.partial(path, eval_capacity_factor=0.6)
    assert_as_announced(path(), mesh_of(expert=2), train=False)
