"""Checks the grouped matmuls against the reference and times them; prints Markdown tables.

    python -m benchmarks.grouped_matmul [--implementations=mosaic,ragged] [--rest=0.25]

The three products of a grouped matmul are the forward pass, the input gradient (dx) and the weight
gradient (dw).  The check runs on a small shape whose padding rows are NaN.  Speeds are TFLOP/s of
the rows that belong to an expert, beside a plain matmul of 8192^3 in bfloat16 (1024^3 in float32 on
a CPU).  A pause of `--rest` seconds before each short burst keeps a GPU below its power limit; with
`--rest=0` all figures, also of the plain matmul, are those of a chip without pauses.
N rows, D inputs, F outputs, E experts.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.grouped_matmul import IMPLEMENTATIONS, reference
from moe_jax.ops.mosaic import choose

# name -> rows, in, out, experts
GPU_SHAPES = {
    "Mixtral up": (32768, 4096, 14336, 8),
    "OLMoE up": (131072, 2048, 2048, 64),
    "OLMoE down": (131072, 1024, 2048, 64),
}
CPU_SHAPES = {"small": (2048, 256, 512, 8)}
CHECKED = (2048, 512, 768, 8)
PRODUCTS = ("forward", "input_gradient", "weight_gradient")
ROUNDS, BURST = 3, 0.02  # bursts per product; seconds of work per burst
TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-3}  # relative; a GPU rounds float32 operands to tf32


def even(rows: int, experts: int) -> np.ndarray:
    """Give each expert the same number of rows."""
    return np.full(experts, rows // experts)


def zipf(rows: int, experts: int) -> np.ndarray:
    """Use shares 1, 1/2, 1/3, ... in a shuffled order; the sizes are not multiples of a tile."""
    shares = np.random.default_rng(0).permutation(1 / np.arange(1, experts + 1))
    sizes = np.floor(rows * shares / shares.sum()).astype(int)
    sizes[0] += rows - sizes.sum()
    return sizes


def half_empty(rows: int, experts: int) -> np.ndarray:
    """Leave every second expert without rows."""
    return np.where(np.arange(experts) % 2, 2 * rows // experts, 0)


def padded(rows: int, experts: int) -> np.ndarray:
    """Make a quarter of the rows padding."""
    return zipf(rows * 3 // 4, experts)


LOADS = {"even": even, "zipf": zipf, "half empty": half_empty, "padded": padded}


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    fast = ("mosaic",) if choose.runs_here() else ("ragged",) if gpu else ("tiled", "ragged")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementations", default=",".join(fast))
    parser.add_argument("--rest", type=float, default=0.25)
    args = parser.parse_args()
    names = args.implementations.split(",")
    dtype = jnp.bfloat16 if gpu else jnp.float32
    for name in names:
        check(name, dtype)
    print("\n| shape | load | implementation | forward | dx | dw | all | matmul |")
    print("|---|---|---|---|---|---|---|---|")
    for shape_name, shape in (GPU_SHAPES if gpu else CPU_SHAPES).items():
        operands = arrays(shape, dtype)
        products = {
            (n, product): compiled(n, product, operands, shape[3])
            for n in names
            for product in PRODUCTS
        }
        for load in ("even", "zipf", "half empty"):
            sizes = LOADS[load](shape[0], shape[3])
            for name in names:
                cells = timed(
                    {product: products[name, product] for product in PRODUCTS},
                    operands,
                    sizes,
                    args.rest,
                )
                print(f"| {shape_name} | {load} | {name} | {cells} |", flush=True)


def arrays(shape: tuple[int, ...], dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw random x, w and dy."""
    N, D, F, E = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x_ND, dy_NF = (
        jax.random.normal(keys[0], (N, D), dtype),
        jax.random.normal(keys[1], (N, F), dtype),
    )
    return x_ND, jax.random.normal(keys[2], (E, D, F), dtype) / D**0.5, dy_NF


def pick(product: str, x_ND, w_EDF, dy_NF):
    """Pick the two operands of a product."""
    return {
        "forward": (x_ND, w_EDF),
        "input_gradient": (dy_NF, w_EDF),
        "weight_gradient": (x_ND, dy_NF),
    }[product]


def compiled(name: str, product: str, operands, experts: int) -> Callable:
    """Compile a product."""
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    function = getattr(IMPLEMENTATIONS[name], product)
    return jax.jit(function).lower(*pick(product, *operands), sizes).compile()


def check(name: str, dtype) -> None:
    """Check every product at every load on the small shape, with NaN in padding rows."""
    N, E = CHECKED[0], CHECKED[3]
    x, w, dy = arrays(CHECKED, dtype)
    products = {product: compiled(name, product, (x, w, dy), E) for product in PRODUCTS}
    for load, sizes_of in LOADS.items():
        sizes = jnp.asarray(sizes_of(N, E), jnp.int32)
        used = jnp.arange(N)[:, None] < sizes.sum()
        clean = jnp.where(used, x, 0), w, jnp.where(used, dy, 0)
        poisoned = jnp.where(used, x, jnp.nan), w, jnp.where(used, dy, jnp.nan)
        expected = oracle(*(a.astype(jnp.float32) for a in clean), sizes)
        for product in PRODUCTS:
            found = products[product](*pick(product, *poisoned), sizes)
            if product != "weight_gradient":
                found = jnp.where(used, found, 0)
            difference = found.astype(jnp.float32) - expected[product]
            error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected[product]))
            print(f"{name} {product} {load}: relative error {error:.1e}", flush=True)
            if not error < TOLERANCE[jnp.dtype(dtype).name]:
                raise SystemExit(f"{name} {product} is wrong at load {load}.")


@jax.jit
def oracle(x_ND, w_EDF, dy_NF, sizes_E) -> dict[str, jax.Array]:
    """Compute the three products by automatic differentiation of the reference."""
    y_NF, pullback = jax.vjp(lambda x, w: reference(x, w, sizes_E), x_ND, w_EDF)
    dx_ND, dw_EDF = pullback(dy_NF)
    return {"forward": y_NF, "input_gradient": dx_ND, "weight_gradient": dw_EDF}


def timed(products: dict[str, Callable], operands, sizes: np.ndarray, rest: float) -> str:
    """Make the cells: TFLOP/s of each product, of the three together, and of the plain matmul."""
    x_ND, w_EDF, _ = operands
    sizes_E = jnp.asarray(sizes, jnp.int32)
    tflop = 2 * int(sizes.sum()) * x_ND.shape[1] * w_EDF.shape[2] / 1e12
    seconds: dict[str, list[float]] = {product: [] for product in PRODUCTS}
    matmul, square, matmul_tflop = plain_matmul(x_ND.dtype)
    ceiling = []
    for _ in range(ROUNDS):
        for product in PRODUCTS:
            inputs = pick(product, *operands)
            seconds[product].append(
                burst(lambda product=product, i=inputs: products[product](*i, sizes_E), rest)
            )
        ceiling.append(burst(lambda: matmul(square), rest))
    each = [statistics.median(seconds[product]) for product in PRODUCTS]
    speeds = [tflop / s for s in each] + [3 * tflop / sum(each)]
    return " | ".join(f"{s:.3g}" for s in [*speeds, matmul_tflop / statistics.median(ceiling)])


def plain_matmul(dtype) -> tuple[Callable, jax.Array, float]:
    """Make (function, operand, TFLOP) of a square matmul."""
    side = 8192 if dtype == jnp.bfloat16 else 1024
    return SQUARED, jax.random.normal(jax.random.key(1), (side, side), dtype), 2 * side**3 / 1e12


SQUARED = jax.jit(lambda a: a @ a)


def burst(call: Callable[[], jax.Array], rest: float) -> float:
    """The seconds per call, over about BURST seconds of calls, after a pause and two calls."""
    time.sleep(rest)
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    count = max(3, min(30, int(BURST / (time.perf_counter() - began))))
    began = time.perf_counter()
    result = None
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
