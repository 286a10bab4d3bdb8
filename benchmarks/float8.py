"""Times float8 matmuls beside bfloat16 ones, and rounding to float8; prints a Markdown table.

    python -m benchmarks.float8 [--rest=0.25] [--small]

The table has the TFLOP/s of the grouped matmul's forward pass at the shapes of
benchmarks/grouped_matmul.py, with operands that are already rounded, and the milliseconds of
rounding the rows and the experts.  --small uses a shape for a CPU, where float8 gains nothing.
N rows, D inputs, F outputs, E experts.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks.grouped_matmul import CPU_SHAPES, GPU_SHAPES, even, zipf
from benchmarks.timing import timed
from moe_jax.files.formats import table
from moe_jax.ops import float8
from moe_jax.ops.grouped_matmul import grouped_matmul

HEAD = ["shape", "load", "bfloat16", "float8", "rounding rows, ms", "rounding experts, ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rest", type=float, default=0.25, help="seconds before each burst")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    rows = []
    for name, shape in (CPU_SHAPES if given.small else GPU_SHAPES).items():
        for load in (even, zipf):
            rows.append([name, load.__name__, *figures(shape, load, given.rest)])
            print(*rows[-1], flush=True)
    print(f"\n{table([HEAD, *rows], left=2)}")


def figures(shape: tuple[int, int, int, int], load, rest: float) -> list[str]:
    """Measure the last four cells of a row."""
    N, D, F, E = shape
    x_ND = jax.random.normal(jax.random.key(0), (N, D), jnp.bfloat16)
    w_EDF = jax.random.normal(jax.random.key(1), (E, D, F), jnp.bfloat16)
    sizes_E = jnp.asarray(load(N, E), jnp.int32)
    (x8_ND, _), (w8_EDF, _) = float8.round_rows(x_ND), float8.round_experts(w_EDF)
    w8_EFD = w8_EDF.swapaxes(1, 2) + 0  # the addition materialises this layout

    def seconds(function, *operands) -> float:
        compiled = jax.jit(function)
        return timed(lambda: compiled(*operands), rest)

    plain = seconds(grouped_matmul, x_ND, w_EDF, sizes_E)
    rounded = seconds(float8.product(x_ND, w_EDF), x8_ND, w8_EFD, sizes_E)
    tflop = 2 * N * D * F / 1e12
    rounding = (
        seconds(function, operand)
        for function, operand in ((float8.round_rows, x_ND), (float8.round_experts, w_EDF))
    )
    return [
        f"{tflop / plain:.0f}",
        f"{tflop / rounded:.0f}",
        *(f"{1e3 * found:.2f}" for found in rounding),
    ]


if __name__ == "__main__":
    main()
