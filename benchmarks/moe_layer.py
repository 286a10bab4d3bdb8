"""One MoE layer, forward and backward: TFLOP/s of router and experts beside a plain matmul.

    python benchmarks/moe_layer.py [--shapes=mixtral,olmoe] [--dispatch=dropless] [--rest=0]

Router, gathers, activation and combine are in the time; counted are the products of the K chosen
experts and of the router, forward and backward, and nothing that was padded, recomputed or (under
`capacity`) given to a slot without a token.  The optimizer is not part of it: weights are already
in bfloat16, gradients come back in bfloat16.  `load` says how even the router is: `even` sends as
many tokens to each expert, `natural` is a random router on random tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.markdown import table
from moe_jax.model.config import ModelConfig
from moe_jax.model.moe.config import MoEConfig
from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.types import MoEContext
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.xla_flags import avoid_command_buffers

# name -> tokens, D, F, E, K
SHAPES = {
    "mixtral": (16384, 4096, 14336, 8, 2),
    "mixtral_2b": (16384, 2048, 7168, 8, 2),
    "olmoe": (16384, 2048, 1024, 64, 8),
    "small": (512, 64, 64, 8, 2),
}
ROUNDS, CALLS = 5, 10


def layer(shape: tuple[int, ...], dispatch: str) -> tuple[Callable, Any]:
    """(compiled (params, x) -> gradients, its arguments)."""
    N, D, F, E, K = shape
    moe = MoEConfig(num_experts=E, expert_width=F, top_k=K, dispatch=dispatch)
    config = ModelConfig(width=D, num_layers=1, moe=moe)
    params: Any
    graph, params = nnx.split(MoE(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0)))
    names = ("w_in_EDUF", "w_out_EFD")
    weights = {name: params[name][...].astype(jnp.bfloat16) for name in names}
    weights["router_kernel"] = params["router_kernel"][...]
    rows = 4
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    context = MoEContext(
        token_ids_BT=jnp.zeros((rows, N // rows), jnp.int32),
        mask_BT=jnp.ones((rows, N // rows), bool),
        row_keys_B=jax.random.split(jax.random.key(0), rows),
        mesh=mesh,
        group_rows=1,
        train=True,
    )

    def loss(weights, x_BTD, dy_BTD):
        module: Any = nnx.merge(graph, weights)
        y_BTD, aux = module(x_BTD, context)
        return (y_BTD * dy_BTD).astype(jnp.float32).sum() + aux.router.balance.value(), aux.stats

    keys = jax.random.split(jax.random.key(1))
    x, dy = (jax.random.normal(key, (rows, N // rows, D), jnp.bfloat16) for key in keys)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return step, (weights, x, dy)


def even(shape: tuple[int, ...], arguments: Any) -> Any:
    """Tokens whose largest features are K experts in turn, and a router that reads those."""
    N, D, _, E, K = shape
    weights, x, dy = arguments
    first = jnp.arange(N)[:, None] * K % E
    near = (jnp.arange(E) - first) % E
    x = x.reshape(N, D).at[:, :E].set(jnp.where(near < K, 8.0 - near, 0).astype(x.dtype))
    kernel = jnp.zeros((D, E)).at[:E].set(jnp.eye(E))
    return {**weights, "router_kernel": kernel}, x.reshape(dy.shape), dy


def timed(call: Callable[[], Any], rest: float) -> float:
    """Seconds of a call: the median of ROUNDS bursts of CALLS."""
    jax.block_until_ready(call())
    times = []
    for _ in range(ROUNDS):
        time.sleep(rest)
        began = time.perf_counter()
        for _ in range(CALLS):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / CALLS)
    return statistics.median(times)


def plain(rest: float) -> float:
    """TFLOP/s of an 8192^3 product (1024^3 on a CPU)."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    matmul = jax.jit(jnp.matmul)
    return 2 * size**3 / timed(lambda: matmul(a, a), rest) / 1e12


def main() -> None:
    avoid_command_buffers()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="mixtral,mixtral_2b,olmoe")
    parser.add_argument("--dispatch", default="dropless,capacity")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds before each burst")
    given = parser.parse_args()
    rows = [["shape", "dispatch", "load", "ms", "TFLOP/s", "kept", "plain matmul beside"]]
    for name in given.shapes.split(","):
        N, D, F, E, K = shape = SHAPES[name]
        flops = 6 * N * (3 * D * F * K + D * E)
        for dispatch in given.dispatch.split(","):
            step, natural = layer(shape, dispatch)
            loads = {"natural": natural, "even": even(shape, natural)}
            for load, arguments in loads.items():
                (_, stats), _ = step(*arguments)
                kept = float(stats.fates.kept / stats.assignments)
                seconds = timed(lambda: step(*arguments), given.rest)  # noqa: B023
                speed = f"{flops / seconds / 1e12:.0f}"
                beside = f"{plain(given.rest):.0f}"
                rows.append(
                    [name, dispatch, load, f"{1e3 * seconds:.2f}", speed, f"{kept:.1%}", beside]
                )
                print(" ".join(rows[-1]), flush=True)
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print(table(rows, left=3))


if __name__ == "__main__":
    main()
