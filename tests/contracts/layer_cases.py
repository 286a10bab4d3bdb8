"""One MoE layer in float64 as a function of its arrays, the oracles, and the inputs that try it."""

import functools
import itertools
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.model.config import ModelConfig
from moe_jax.model.moe.config import MoEConfig
from moe_jax.model.moe.dispatch.dense import Dense
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.layer import MoE, make_router
from moe_jax.model.moe.types import DispatchIn, MoEContext, RouterIn
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.rules import sharding

B, T, D, E, F = 16, 8, 16, 8, 12
ROWS = 2  # rows in a routing group: the most that a device holds on every mesh below
GROUPS, TOKENS = B // ROWS, ROWS * T  # G and S

MESHES = {
    "one_device": {},
    "data8": {"data": 8},
    "expert8": {"expert": 8},
    "data2_expert4": {"data": 2, "expert": 4},
    "fsdp2_expert2_tensor2": {"fsdp": 2, "expert": 2, "tensor": 2},
}
# Routers that the scenarios steer through their one matrix, and whose tokens choose.
STEERED = ("switch", "gshard", "top_k")
AXES = {
    "router_kernel": ("embed", "router_experts"),
    "w_in_EDUF": ("experts", "expert_embed", None, "expert_mlp"),
    "w_out_EFD": ("experts", "expert_mlp", "expert_embed"),
}


class Case(NamedTuple):
    """The arrays of one scenario (NumPy; the keys are made from them)."""

    params: dict[str, Any]
    x_BTD: Any
    mask_BT: Any
    cotangent_BTD: Any


class Result(NamedTuple):
    """What one forward and backward pass gave, as NumPy."""

    y_BTD: Any
    params: dict[str, Any]  # gradients
    x_BTD: Any  # gradient
    aux: Any
    choice: Any = None  # of the oracle only


def pairwise(*axes):
    """The product of `axes`; cells beyond a greedy cover of all pairs of values are `full`."""
    cells = list(itertools.product(*axes))

    def pairs(cell):
        return set(itertools.combinations(enumerate(cell), 2))

    missing = set().union(*map(pairs, cells))
    chosen = set()
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))
        chosen.add(best)
        missing -= pairs(best)
    return [pytest.param(*cell, marks=[] if cell in chosen else pytest.mark.full) for cell in cells]


def layer_config(router: str, dispatch: str, **moe) -> ModelConfig:
    """A layer of the shapes above; top_k makes three choices, so that K is 1, 2 and 3 in turn."""
    moe = {"num_experts": E, "expert_width": F, "top_k": 3, **moe}
    return ModelConfig(width=D, moe=MoEConfig(router=router, dispatch=dispatch, **moe))


def mesh(name: str) -> jax.sharding.Mesh:
    """A mesh of MESHES on the first so many devices."""
    config = MeshConfig(**{"data": 1, **MESHES[name]})
    return make_mesh(config, jax.devices()[: config.batch_shards * config.tensor])


def _case(seed: int, bias_E=None, lengths_B=None, even: bool = False) -> Case:
    """Random tokens whose feature 0 is 1, so that row 0 of the router kernel is a bias."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, T, D))
    x[..., 0] = 1
    kernel = rng.normal(size=(D, E)) * 0.4
    if even:  # token n prefers expert n, then n + 1, then n + 2
        number = np.arange(B * T).reshape(B, T)
        x[..., 1 : E + 1] = sum(
            (4 - k) * np.eye(E)[(number + k) % E] for k in range(3)
        ) + 0.01 * rng.normal(size=(B, T, E))
        kernel = np.zeros((D, E))
        kernel[1 : E + 1] = np.eye(E)
    if bias_E is not None:
        kernel[0] = bias_E
    lengths = np.full(B, T) if lengths_B is None else np.asarray(lengths_B)
    params = {
        "router_kernel": kernel,
        "w_in_EDUF": rng.normal(size=(E, D, 2, F)) / np.sqrt(D),
        "w_out_EFD": rng.normal(size=(E, F, D)) / np.sqrt(F),
    }
    return Case(params, x, np.arange(T) < lengths[:, None], rng.normal(size=(B, T, D)))


SCENARIOS = {
    "even": _case(0, even=True),
    "skewed": _case(1, bias_E=np.linspace(2, -2, E)),
    "empty_experts": _case(2, bias_E=[0, 0, -60, -60, -60, -60, 0, 0]),
    "one_expert": _case(3, bias_E=[0, 0, 0, 0, 0, 9, 0, 0]),
    "padded": _case(4, lengths_B=[8, 3, 0, 0, 1, 8, 7, 5, 8, 8, 0, 2, 6, 8, 4, 0]),
}


def _context(case: Case, mesh, rows: int = ROWS) -> MoEContext:
    batch = case.x_BTD.shape[0]
    key = jax.random.key(7, impl="threefry2x32")
    return MoEContext(
        token_ids_BT=jnp.zeros(case.mask_BT.shape, jnp.int32),
        mask_BT=case.mask_BT,
        row_keys_B=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch)),
        mesh=mesh,
        group_rows=rows,
        train=True,
    )


def _total(y_BTD, router_aux, case: Case):
    """A loss that reaches every gradient through the output, the balance loss and the z-loss."""
    return (y_BTD * case.cotangent_BTD).sum() + router_aux.balance.value() + router_aux.z.value()


def layer_function(config: ModelConfig, mesh, dtype=jnp.float64):
    """(params, x_BTD, case) -> ((loss, (y_BTD, aux)), gradients) of the real MoE module."""
    make = functools.partial(MoE, config, dtype=dtype, rngs=nnx.Rngs(params=0))
    graph = nnx.split(nnx.eval_shape(make))[0]

    def loss(params, x_BTD, case):
        y_BTD, aux = nnx.merge(graph, params)(x_BTD, _context(case, mesh))
        return _total(y_BTD, aux.router, case), (y_BTD, aux)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def shardings(mesh):
    """Where the trainer keeps the arrays of (params, x_BTD, case)."""
    params = {name: sharding(mesh, axes) for name, axes in AXES.items()}
    x = sharding(mesh, ("batch", None, None))
    return params, x, Case(params, x, sharding(mesh, ("batch", None)), x)


def compiled_layer(config: ModelConfig, mesh):
    """`run(case) -> Result` through one compiled function for all scenarios."""
    step = jax.jit(layer_function(config, mesh), in_shardings=shardings(mesh))

    def run(case: Case) -> Result:
        (_, (y, aux)), (params, x) = jax.device_get(step(case.params, case.x_BTD, case))
        return Result(y, params, x, aux)

    return run


@functools.cache
def oracle(router: str):
    """`run(case, kept_BTK) -> Result`: every expert on every token, on one device.

    Only the choices in `kept_BTK` count (None: all), so that it also gives the gradients of a
    layer that drops.
    """
    config = layer_config(router, "dense")
    one, chosen = mesh("one_device"), make_router(config.moe)

    def loss(params, x_BTD, case, kept_GSK):
        context = _context(case, one)
        x_GSD = x_BTD.reshape(GROUPS, TOKENS, D)
        mask_GS = case.mask_BT.reshape(GROUPS, TOKENS)
        keys_GR = context.row_keys_B.reshape(GROUPS, ROWS)
        ids_GS = context.token_ids_BT.reshape(GROUPS, TOKENS)
        inputs = RouterIn(x_GSD, ids_GS, mask_GS, keys_GR, True)
        choice, aux = chosen.route(inputs, {"kernel": params["router_kernel"]}, {})
        kept = choice._replace(valid_GSK=choice.valid_GSK & kept_GSK)
        experts = Experts(params["w_in_EDUF"], params["w_out_EFD"], config.activation)
        y_GSD, _ = Dense()(x_GSD, kept, experts, DispatchIn(mask_GS, ROWS, True, one))
        y_BTD = y_GSD.reshape(B, T, D)
        return _total(y_BTD, aux, case), (y_BTD, aux, choice)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    every = np.ones((GROUPS, TOKENS, chosen.choices), bool)

    def run(case: Case, kept_GSK=None) -> Result:
        kept = every if kept_GSK is None else kept_GSK
        (_, (y, aux, choice)), (params, x) = jax.device_get(
            step(case.params, case.x_BTD, case, kept)
        )
        return Result(y, params, x, aux, choice)

    return run


def numpy_capacity(tokens: int, choices: int, factor: float, experts: int) -> int:
    """ceil(S * K * factor / E) in exact arithmetic, between 1 and S."""
    exact = Fraction(str(factor)) * tokens * choices / experts
    return min(tokens, max(1, -(-exact.numerator // exact.denominator)))


def numpy_kept(wanted_GSK, choice, rows: int, capacity: int, priority: str, experts: int):
    """Which assignments get a slot, one after the other."""
    ids_GSK = choice.ids_GSK
    groups, tokens, choices = ids_GSK.shape
    positions = tokens // rows
    kept = np.zeros(ids_GSK.shape, bool)
    for g in range(groups):
        free = [capacity] * experts
        first = [r * positions + t for t in range(positions) for r in range(rows)]
        if priority == "batch":
            largest_S = np.where(wanted_GSK[g], choice.weights_GSK[g], -1).max(-1)
            first = sorted(range(tokens), key=lambda s: (-largest_S[s], s))
        order = [(s, k) for k in range(choices) for s in first]
        if priority == "token":
            order = itertools.product(first, range(choices))
        for s, k in order:
            e = ids_GSK[g, s, k]
            if wanted_GSK[g, s, k] and free[e] > 0:
                free[e] -= 1
                kept[g, s, k] = True
    return kept


def numpy_output(case: Case, choice, kept_GSK):
    """y of every token: the sum over its kept choices, one expert at a time."""
    x_ND = case.x_BTD.reshape(-1, D)
    choices = choice.ids_GSK.shape[2]
    ids, weights, kept = (
        a.reshape(-1, choices) for a in (choice.ids_GSK, choice.weights_GSK, kept_GSK)
    )
    y_ND = np.zeros_like(x_ND)
    for n, k in zip(*np.nonzero(kept), strict=True):
        w_in_DUF = case.params["w_in_EDUF"][ids[n, k]]
        gate_F, up_F = x_ND[n] @ w_in_DUF[:, 0], x_ND[n] @ w_in_DUF[:, 1]
        hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
        y_ND[n] += weights[n, k] * (hidden_F @ case.params["w_out_EFD"][ids[n, k]])
    return y_ND.reshape(case.x_BTD.shape)


def assert_close(found, expected, what: str) -> None:
    """Equal to 1e-11 of the largest element."""
    assert found.dtype == expected.dtype == np.float64, what
    error, scale = np.abs(found - expected).max(), np.abs(expected).max()
    assert error <= 1e-11 * scale + 1e-14, f"{what}: {error:.1e} off at a scale of {scale:.1e}"


def assert_agrees(found: Result, expected: Result) -> None:
    """Outputs and every gradient; each expert alone, so that a large one hides no other."""
    assert_close(found.y_BTD, expected.y_BTD, "output")
    assert_close(found.x_BTD, expected.x_BTD, "gradient of the tokens")
    for name, gradient in expected.params.items():
        if name == "router_kernel":
            assert_close(found.params[name], gradient, name)
            continue
        for e in range(E):
            assert_close(found.params[name][e], gradient[e], f"gradient of {name}, expert {e}")
    for name in ("balance", "z", "entropy"):
        ours, theirs = getattr(found.aux.router, name), getattr(expected.aux, name)
        assert_close(ours.sum, theirs.sum, name)
        assert ours.count == theirs.count, name


def assert_counts(found: Result, case: Case, choice, kept_GSK, cause: str) -> None:
    """Every assignment in exactly one place: kept, dropped for `cause`, unsampled or padding."""
    real_GS1 = case.mask_BT.reshape(GROUPS, TOKENS, 1)
    wanted_GSK = choice.valid_GSK & real_GS1
    fates = found.aux.stats.fates
    expected = dict.fromkeys(fates._fields, 0) | {
        "kept": kept_GSK.sum(),
        cause: (wanted_GSK & ~kept_GSK).sum(),
        "unsampled": (~choice.valid_GSK & real_GS1).sum(),
        "padding": (~case.mask_BT).sum() * wanted_GSK.shape[2],
    }
    assert {name: int(n) for name, n in fates._asdict().items()} == expected
    assert found.aux.stats.assignments == wanted_GSK.size
    assert found.aux.stats.lost_tokens == (real_GS1[..., 0] & ~kept_GSK.any(-1)).sum()
    assert found.aux.stats.conserved()
    for axis in found.aux.ledger:
        assert {name: int(n.sum()) for name, n in axis._asdict().items()} == expected
    load_E = np.bincount(choice.ids_GSK[wanted_GSK], minlength=E)
    np.testing.assert_array_equal(found.aux.load_E, load_E)


def wanted(case: Case, choice):
    """Sampled choices of real tokens."""
    return choice.valid_GSK & case.mask_BT.reshape(GROUPS, TOKENS, 1)
