"""Benchmarks a layer at several numbers of experts E, at the same active FLOPs.

    python -m benchmarks.expert_counts [--shapes=fine] [--experts=8,64,256] [--dispatch=capacity]

One MoE layer with fixed tokens, width and experts per token, while E grows: `fine` has 8 experts of
width 1024 per token (at E = 8 that is all of them, a dense layer), `middle` 4 of width 2048.  At
E = 256 they have 1.6 and 3.2 billion weights.  Three parts are timed separately:

  forward + backward  as in moe_layer.py: weights and gradients in bfloat16
  cast                the bfloat16 copy of the float32 weights, once per step
  AdamW               clipping by the global norm, float32 weights and moments

The last two depend only on the number of weights, not on the routing.  The columns `/ E=8` are
ratios to the time at the first E.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.layer import LOADS, Shape, layer
from benchmarks.timing import plain, timed
from moe_jax.files.formats import table
from moe_jax.nn.params import ParamRule
from moe_jax.parallel.xla_flags import avoid_command_buffers
from moe_jax.train.optim import Optimizer, OptimizerConfig

SHAPES = {
    "fine": Shape(8, 4096, 2048, 1024, 8, 8),
    "middle": Shape(8, 4096, 2048, 2048, 8, 4),
    "small": Shape(4, 128, 64, 64, 8, 2),
}
STEPS = 1000  # length of the schedule; more steps than any benchmark runs


def main() -> None:
    avoid_command_buffers()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="fine,middle")
    parser.add_argument("--experts", default="8,16,32,64,128,256")
    parser.add_argument("--dispatch", default="dropless", help="dropless | capacity | ...")
    parser.add_argument("--load", default="natural", choices=LOADS)
    parser.add_argument("--rest", type=float, default=0.0, help="seconds before each burst")
    given = parser.parse_args()
    counts = [int(count) for count in given.experts.split(",")]
    ratio = f"/ E={counts[0]}"
    heading = ["shape", "experts", "weights", "forward + backward, ms", ratio, "TFLOP/s", "kept"]
    rows = [[*heading, "cast, ms", "AdamW, ms", "all, ms", ratio, "plain matmul beside"]]
    for name in given.shapes.split(","):
        first: tuple[float, float] | None = None
        for count in counts:
            shape = SHAPES[name]._replace(experts=count)
            size, kept, times = costs(shape, given.dispatch, given.load, given.rest)
            both, cast, adamw = (1e3 * seconds for seconds in times)
            every = both + cast + adamw
            first = first or (both, every)
            speed = shape.flops / both / 1e9
            line = [
                name,
                f"{count}",
                f"{size / 1e6:,.1f}M",
                f"{both:.2f}",
                f"{both / first[0]:.2f}",
            ]
            line += [f"{speed:.3g}", f"{kept:.1%}", f"{cast:.2f}", f"{adamw:.2f}", f"{every:.2f}"]
            rows.append([*line, f"{every / first[1]:.2f}", f"{plain(given.rest):.3g}"])
            print(" ".join(rows[-1]), flush=True)
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}, {given.dispatch}\n")
    print(table(rows, left=1))


def costs(
    shape: Shape, dispatch: str, load: str, rest: float
) -> tuple[int, float, tuple[float, float, float]]:
    """Measure (weights, kept share, (seconds of forward + backward, of cast, of AdamW))."""
    step, arguments = layer(shape, dispatch)
    arguments = LOADS[load](shape, arguments)
    (_, stats), (gradients, _) = step(*arguments)
    kept = float(stats.outcomes.kept / stats.assignments)
    both = timed(lambda: step(*arguments), rest)
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), arguments[0])
    size = sum(leaf.size for leaf in jax.tree.leaves(weights))
    del arguments, stats  # free the tokens' memory before the optimizer needs memory
    copy = jax.jit(lambda tree: jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree))
    cast = timed(lambda: copy(weights), rest)
    return size, kept, (both, cast, timed(update(weights, gradients), rest))


def update(weights: Any, gradients: Any) -> Callable[[], Any]:
    """Make a function that applies AdamW to its last result; `weights` are donated."""
    config = OptimizerConfig()
    rules = jax.tree.map(lambda w: ParamRule("experts", (None,) * w.ndim), weights)
    optimizer = Optimizer(config, STEPS)

    def one(params, moments, gradients):
        norm = optax.tree.norm(gradients)
        scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
        clipped = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients)
        return optimizer.update(clipped, moments, params, rules, jnp.int32(config.warmup_steps))

    compiled = jax.jit(one, donate_argnums=(0, 1))
    held = [weights, jax.jit(lambda tree: optimizer.init(tree, rules))(weights)]

    def call() -> Any:
        held[:] = compiled(*held, gradients)
        return held

    return call


if __name__ == "__main__":
    main()
