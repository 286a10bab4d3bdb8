"""Times one MoE layer, forward and backward: TFLOP/s of router and experts.

    python -m benchmarks.moe_layer [--shapes=mixtral,olmoe] [--dispatch=dropless] [--rest=0]

The time includes router, gathers, activation and combine.  The FLOPs are those of the matmuls of K
experts per token and of the router, forward and backward, without padding, recomputation and, under
`capacity`, empty slots.  The optimizer is not included: weights and gradients are in bfloat16.
`load` is the balance of the router: `even` assigns equally many tokens to each expert, `natural` is
a random router on random tokens.
"""

import argparse

import jax

from benchmarks.layer import LOADS, Shape, layer
from benchmarks.timing import plain, timed
from moe_jax.files.formats import table
from moe_jax.parallel.xla_flags import avoid_command_buffers

SHAPES = {
    "mixtral": Shape(4, 4096, 4096, 14336, 8, 2),
    "mixtral_2b": Shape(4, 4096, 2048, 7168, 8, 2),
    "olmoe": Shape(4, 4096, 2048, 1024, 64, 8),
    "small": Shape(4, 128, 64, 64, 8, 2),
}


def main() -> None:
    avoid_command_buffers()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="mixtral,mixtral_2b,olmoe")
    parser.add_argument("--dispatch", default="dropless,capacity")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds before each burst")
    given = parser.parse_args()
    rows = [["shape", "dispatch", "load", "ms", "TFLOP/s", "kept", "plain matmul beside"]]
    for name in given.shapes.split(","):
        shape = SHAPES[name]
        for dispatch in given.dispatch.split(","):
            step, arguments = layer(shape, dispatch)
            for load, make in LOADS.items():
                loaded = make(shape, arguments)
                (_, stats), _ = step(*loaded)
                kept = float(stats.outcomes.kept / stats.assignments)
                seconds = timed(lambda: step(*loaded), given.rest)  # noqa: B023
                speed = f"{shape.flops / seconds / 1e12:.3g}"
                beside = f"{plain(given.rest):.3g}"
                rows.append(
                    [name, dispatch, load, f"{1e3 * seconds:.2f}", speed, f"{kept:.1%}", beside]
                )
                print(" ".join(rows[-1]), flush=True)
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print(table(rows, left=3))


if __name__ == "__main__":
    main()
