"""Checks the balance loss: its value at a balanced load, and its gradient on any mesh.

B rows, T positions, G routing groups, S tokens per group, K experts per token, E experts, D width,
R rows per group.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import Config
from moe_jax.data.batch import Batch, make_batch
from moe_jax.data.feed import put_batch
from moe_jax.model.define import Params, define
from moe_jax.model.initialize import init
from moe_jax.moe.components import router_state
from moe_jax.moe.config import BALANCE_SCOPES, MoEConfig
from moe_jax.moe.types import ExpertChoice, Router, RouterIn
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.shrink import shrink
from moe_jax.tools.doctor.start import NO_EXPERTS
from moe_jax.tools.doctor.subject import Subject
from moe_jax.train.state import param_shardings, replicated
from moe_jax.train.step import StepOptions, make_gradients

UNIFORM_TOLERANCE = 1e-3  # for means in float32
MESH_TOLERANCE = 1e-3  # relative, for float32 gradients summed in a different order
GROUP_ROWS, LENGTH = 2, 16
IDS_PER_EXPERT = 256
VOCABULARY = 256


class Routed(NamedTuple):
    """A router's balance loss on some tokens, and the same value computed from the load alone."""

    balance: float
    spread: float  # E times the sum of squared shares of the load: 1 if balanced, E at worst


def balance_at_uniform(subject: Subject) -> Finding:
    """Check the balance loss of tokens that prefer the experts in turn, and of equal tokens."""
    if not subject.moe_layers:
        return NO_EXPERTS
    parts = subject.run.model.components
    assert parts is not None  # the model has MoE layers
    return uniform_balance(parts.router, subject.run.config.model.moe)


def uniform_balance(router: Router, moe: MoEConfig) -> Finding:
    """Compare the balance loss of the router that `moe` names with the load of its assignments.

    A hash router may be unable to balance the load, because the size of its table need not be a
    multiple of E.  That is not a fault of the loss.
    """
    even, alike = (routed(router, moe.num_experts, alike) for alike in (False, True))
    figure = f"{even.balance:.4f} with router {moe.router}, {moe.num_experts} experts"
    figure += f", top-{moe.top_k}"
    if alike.spread - 1 <= UNIFORM_TOLERANCE:
        figure += ": balanced by construction, whatever the router learns"
        reacts = True
    else:
        figure += f"; {alike.balance:.2f} if all tokens are equal"
        reacts = alike.balance - 1 > UNIFORM_TOLERANCE
    if abs(even.spread - 1) > UNIFORM_TOLERANCE:
        figure += f"; the load of its assignments gives {even.spread:.4f}"
    return Finding(
        reacts and abs(even.balance - even.spread) <= UNIFORM_TOLERANCE,
        figure,
        f"Define the balance loss of router {moe.router} as E * sum(share of assignments * mean "
        f"probability), where both sum to 1 over the experts.",
    )


def routed(router: Router, num_experts: int, alike: bool = False) -> Routed:
    """Route tokens whose first choices are balanced over the experts.

    The router matrix is the identity, and the logits of token s are one ramp rotated by s, so that
    every expert has every rank once.  A router without parameters gets many token ids.  `alike`:
    all tokens equal the first one.
    """
    E = num_experts
    specs = router.param_specs(E, E)
    S = E if specs else E * IDS_PER_EXPERT
    token_S = np.zeros(S, np.int32) if alike else np.arange(S, dtype=np.int32)
    turned_SE = (np.arange(E) - token_S[:, None]) % E
    params = {
        name: jnp.eye(E) if name == "kernel" else jnp.zeros(spec.shape)
        for name, spec in specs.items()
    }
    inputs = RouterIn(
        x_GSD=jnp.asarray(-4.0 * turned_SE[None] / E, jnp.float32),
        token_ids_GS=jnp.asarray(token_S[None]),
        mask_GS=jnp.ones((1, S), bool),
        keys_GR=jax.random.key(0, impl="threefry2x32")[None, None],
        train=False,
    )
    state = router_state(router, E, None, jnp.float32)
    choice, aux = jax.jit(lambda params: router.route(inputs, params, state))(params)
    by_token = choice.by_token(S) if isinstance(choice, ExpertChoice) else choice
    share_E = np.bincount(np.asarray(by_token.ids_GSK)[by_token.valid_GSK], minlength=E)
    share_E = share_E / share_E.sum()
    return Routed(float(aux.balance.value()), float(E * (share_E**2).sum()))


def balance_gradient(subject: Subject) -> Finding:
    """Compare the gradient of the balance loss alone on one device and on the run's mesh.

    The gradient is computed by the train step's own code on a one-layer model, once per scope.  If
    the run has one device, the mesh is eight virtual devices.  Scopes that do not depend on
    accumulation use two microbatches on the mesh.  Rows are padded unevenly, so that a mean of
    means would differ.
    """
    if not subject.moe_layers:
        return NO_EXPERTS
    sizes, devices = _other_mesh(subject)
    config = one_layer(shrink(subject.plan.asked, sizes))
    alone, mesh = make_mesh(MeshConfig(1), _first_here(devices)), make_mesh(sizes, devices)
    rows = 2 * GROUP_ROWS * sizes.batch_shards
    params = _first_params(config)
    first, spread = Rows(config, params, alone, 1, rows), Rows(config, params, mesh, 1, rows)
    halves = Rows(config, params, mesh, 2, rows)
    worst = (0.0, "")
    for scope in BALANCE_SCOPES:
        expected = gradient(first, scope)
        # `global` is a product of means over the microbatch, so it depends on accumulation.
        found = gradient(spread if scope == "global" else halves, scope)
        size = _norm(expected)
        if not size:
            return Finding(True, f"0: router {config.model.moe.router} has no balance gradient")
        off = _norm([x - y for x, y in zip(found, expected, strict=True)]) / size
        if not off <= worst[0]:
            worst = (off, scope)
    axes = " x ".join(f"{k} {n}" for k, n in dataclasses.asdict(sizes).items() if n > 1)
    return Finding(
        worst[0] <= MESH_TOLERANCE,
        f"relative difference at most {worst[0]:.1e} (scope {worst[1] or 'any'}): 1 device against "
        f"{axes or '1 device'} (scopes group and row: with 2 microbatches)",
        "Compute the balance loss per logical group or row, as a sum and a count that are added "
        "over devices and microbatches.",
    )


def _other_mesh(subject: Subject) -> tuple[MeshConfig, Sequence[Any]]:
    """The run's mesh, or data x expert over all virtual CPU devices if the run has one device."""
    if len(subject.devices) > 1:
        return subject.run.config.mesh, subject.devices
    devices = jax.devices("cpu")
    expert = math.gcd(max(1, len(devices) // 2), subject.config.model.moe.num_experts)
    return MeshConfig(data=len(devices) // expert, expert=expert), devices


def _first_here(devices: Sequence[Any]) -> list[Any]:
    """The first device of this process, in a list."""
    return [device for device in devices if device.process_index == jax.process_index()][:1]


def one_layer(config: Config) -> Config:
    """Make a one-layer model with the config's router, whose only loss is the balance loss.

    That loss does not depend on the dispatch path or the head, so those that compile fastest are
    used.
    """
    model = config.model
    moe = dataclasses.replace(
        model.moe,
        every=1,
        first_dense=0,
        group_rows=GROUP_ROWS,
        dispatch="dense",
        balance_weight=1.0,
        z_weight=0.0,
    )
    model = dataclasses.replace(
        model,
        vocab_size=VOCABULARY,
        num_layers=1,
        scan_layers=False,
        remat="none",
        attention="xla",
        cross_entropy="full",
        logits_z_weight=0.0,
        moe=moe,
    )
    return dataclasses.replace(config, model=model)


class Rows:
    """A one-layer model, its parameters and a batch on a mesh, split into microbatches."""

    def __init__(self, config: Config, params: Params, mesh: Mesh, parts: int, rows: int):
        """Make the same numbers for any mesh and any number of microbatches (`parts`)."""
        where = param_shardings(define(config.model, jnp.float32), mesh)
        self.config, self.mesh = config, mesh
        self.params = jax.tree.map(_place, params, where)
        self.batch = _batch(config.seed, rows, parts, mesh)


def _first_params(config: Config) -> Params:
    """Initialise parameters as NumPy arrays, which are equal on every process."""
    key = jax.random.key(config.seed, impl="threefry2x32")
    return jax.device_get(jax.jit(partial(init, define(config.model, jnp.float32)))(key))


def _place(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def gradient(on: Rows, scope: str) -> list[np.ndarray]:
    """Compute the gradient of the balance loss in `scope` for every parameter, in float32."""
    moe = dataclasses.replace(on.config.model.moe, balance_scope=scope)
    model = define(dataclasses.replace(on.config.model, moe=moe), jnp.float32)
    options = StepOptions(seed=on.config.seed)
    evaluate = jax.jit(make_gradients(model, options, on.mesh), out_shardings=replicated(on.mesh))
    assert model.components is not None  # its one layer is an MoE layer
    state = router_state(model.components.router, moe.num_experts, 1, jnp.float32)
    # At a lower precision, rounding would assign tokens to other experts.
    with jax.default_matmul_precision("highest"):
        grads = evaluate(on.params, state, on.batch, jnp.int32(0))[0]
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jax.device_get(grads))]


def _norm(leaves: Sequence[np.ndarray]) -> float:
    return math.sqrt(sum(float((leaf**2).sum()) for leaf in leaves))


def _batch(seed: int, rows: int, parts: int, mesh: Mesh) -> Batch:
    """Make rows of random tokens and random length; no target counts, so no other loss exists."""
    draw = np.random.default_rng(seed)
    shape = (rows, LENGTH)
    tokens = draw.integers(VOCABULARY, size=shape, dtype=np.int32)
    real = np.arange(LENGTH) < draw.integers(1, LENGTH + 1, size=(rows, 1))
    batch = make_batch(tokens, tokens, real.astype(np.int32))
    return put_batch(batch._replace(loss_mask_BT=np.zeros(shape, bool)), mesh, parts)
