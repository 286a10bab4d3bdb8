"""Collectives, memory and matmul precision of the compiled layer."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.dispatch.capacity import Capacity
from moe_jax.moe.dispatch.einsum import Einsum
from moe_jax.moe.dispatch_types import DispatchIn
from moe_jax.moe.experts import Experts
from moe_jax.moe.routers import ROUTERS
from moe_jax.moe.types import TokenChoice
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.tools.doctor.conformance import cases
from moe_jax.tools.doctor.conformance.cases import MESHES, E
from moe_jax.tools.doctor.conformance.subject import arguments, forward_backward, mesh_of

FOURFOLD = {"fsdp2_expert2_tensor2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2)}
SIZES = MESHES | FOURFOLD
SHARDED = ["data2_expert4", "fsdp2_expert2_tensor2"]


def lowered(router: str, dispatch: str, where: str, **knobs: float):
    """Lower the layer in float32, forward and backward; gradients are sharded like parameters."""
    layer = cases.layer(router, dispatch, "one_device", "float32", remat=False)
    moe = dataclasses.replace(layer.model.moe, options=layer.model.moe.options | {dispatch: knobs})
    model = dataclasses.replace(layer.model, moe=moe)
    layer = dataclasses.replace(layer, model=model, mesh=SIZES[where])
    step, shardings = forward_backward(layer, mesh_of(layer))
    jitted = jax.jit(step, in_shardings=shardings, out_shardings=(None, shardings[:2]))
    case = cases.scenarios(layer.model)["skewed"]
    return jitted.lower(*arguments(layer, case, int(case.mask_BT.sum())))


def over_expert(
    op: str, router: str, dispatch: str, where: str, **knobs: float
) -> list[hlo.Collective]:
    """The floating-point collectives `op` of the compiled layer that cross the expert axis."""
    # [devices] -> position on the expert axis; the axes are data, fsdp, expert, tensor.
    sizes = dataclasses.astuple(SIZES[where])
    position = np.indices(sizes)[2].reshape(-1)
    found = hlo.collectives(lowered(router, dispatch, where, **knobs).compile().as_text())
    return [
        one
        for one in found
        if one.op == op and one.floating and (np.ptp(position[one.groups], axis=1) > 0).any()
    ]


BOUNDED = [("gshard", "capacity", {}), ("top_k", "dropless", {"recv_factor": 2.0})]


@pytest.mark.parametrize("where", SHARDED)
@pytest.mark.parametrize(("router", "dispatch", "knobs"), BOUNDED, ids=["capacity", "dropless"])
def test_only_all_to_all_crosses_the_expert_axis(router, dispatch, knobs, where):
    """Weights, tokens and probabilities are not gathered over it."""
    assert over_expert("all-gather", router, dispatch, where, **knobs) == []
    # Dispatch and combine, each in the forward and the backward pass.
    assert len(over_expert("all-to-all", router, dispatch, where, **knobs)) >= 4


@pytest.mark.parametrize(
    "where", [SHARDED[0], *(pytest.param(n, marks=pytest.mark.lifecycle) for n in SHARDED[1:])]
)
def test_dropless_without_a_bound_gathers_tokens_and_nothing_else(where):
    shards = SIZES[where].expert
    everyone = cases.B * cases.T * shards // SIZES[where].batch_shards
    assert over_expert("all-to-all", "top_k", "dropless", where) == []
    shapes = {one.shape for one in over_expert("all-gather", "top_k", "dropless", where)}
    # Tokens (dispatch), gradients (backward pass of combine), and combine weights.
    assert shapes == {(everyone, cases.D), (everyone, 3)}  # top-3


def test_a_gather_of_experts_would_be_seen():
    """The control: the dense oracle needs all experts on every device."""
    shapes = [one.shape for one in over_expert("all-gather", "top_k", "dense", "data2_expert4")]
    assert any(shape[0] == E for shape in shapes)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "hash"])
def test_the_router_product_is_at_highest_precision(router):
    """The default float32 matmul is TF32 on Hopper and bfloat16 on TPU."""
    text = lowered(router, "capacity", "one_device").as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    ours = [line for line in products if re.search(rf"-> tensor<\d+x\d+x{E}xf32>", line)]
    assert ours and all("precision = [HIGHEST, HIGHEST]" in line for line in ours)
    assert len(ours) < len(products)  # the experts' matmuls have the default


def temporary_bytes(path, experts: int) -> int:
    """Temporary bytes of the forward and backward pass of one group, with 32 tokens per expert."""
    tokens, width, hidden = 32 * experts, 16, 8

    def loss(x_GSD, weights_GSK, w_in, w_out, ids_GSK):
        choice = TokenChoice(ids_GSK, weights_GSK, jnp.ones(ids_GSK.shape, bool))
        inputs = DispatchIn(
            jnp.ones((1, tokens), bool), 1, True, make_mesh(MeshConfig(), jax.devices()[:1])
        )
        y_GSD, _ = path(x_GSD, choice, Experts(w_in, w_out, "swiglu"), inputs)
        return (y_GSD**2).sum()

    shapes = (
        (1, tokens, width),
        (1, tokens, 2),
        (experts, width, 2, hidden),
        (experts, hidden, width),
    )
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    low = step.lower(*arrays, jax.ShapeDtypeStruct((1, tokens, 2), jnp.int32))
    if isinstance(path, Capacity):
        assert hlo.floating_scatters(low.as_text()) == []
    return low.compile().memory_analysis().temp_size_in_bytes


def test_capacity_memory_is_linear_in_tokens_and_moves_nothing_by_scatter():
    """With 16 times the experts and tokens, a [tokens, E, C] array would grow 256 times."""
    assert temporary_bytes(Capacity(), 64) < 1.3 * 16 * temporary_bytes(Capacity(), 4)


def test_the_one_hot_formulation_is_not_linear():
    """The control: the growth that the capacity path avoids."""
    assert temporary_bytes(Einsum(), 64) > 5 * 16 * temporary_bytes(Einsum(), 4)


def test_a_scatter_of_values_would_be_seen():
    """The control: the transpose of a plain gather is a scatter."""
    index = jnp.arange(4)
    step = jax.jit(jax.grad(lambda x: (x[index] ** 2).sum()))
    text = step.lower(jax.ShapeDtypeStruct((9, 3), jnp.float32)).as_text()
    assert hlo.floating_scatters(text) == [(9, 3)]


def compile_log(env, dispatch: str, where: str) -> str:
    """XLA's log while a separate process compiles the train step of a small model."""
    sizes = [f"{axis}={size}" for axis, size in dataclasses.asdict(SIZES[where]).items()]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_step.py"), dispatch, *sizes],
        env=env | {"JAX_ENABLE_COMPILATION_CACHE": "0"},  # a cached program logs nothing
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr
    return done.stderr


@pytest.mark.lifecycle
@pytest.mark.parametrize(
    ("dispatch", "where"),
    [
        ("capacity", "fsdp2_expert2_tensor2"),
        pytest.param("dropless", "data2_expert4", marks=pytest.mark.full),
        # The readable reference, which is not for training.
        pytest.param("einsum", "data2_expert4", marks=pytest.mark.full),
    ],
)
def test_the_train_step_reshards_nothing_by_full_replication(dispatch, where, cli_env):
    """XLA logs a full replication if it finds no better way between two shardings."""
    assert "Involuntary full rematerialization" not in compile_log(cli_env, dispatch, where)


@pytest.mark.lifecycle
def test_a_full_replication_would_be_logged(cli_env):
    """The control: all experts at once, whose backward pass XLA can reshard only by replication."""
    log = compile_log(cli_env, "all_at_once", "data2_expert4")
    assert "Involuntary full rematerialization" in log
