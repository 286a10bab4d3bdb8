"""The Hopper kernels without a GPU: in Pallas's interpreter, whose buffers begin as NaN.

It needs a jax that `choose` lets run the kernels; with an older one what runs instead is called,
and a test holds the other half of that promise: nothing is chosen.
"""

from collections.abc import Callable
from typing import Any

import jax

from moe_jax.ops.mosaic import choose

INTERPRETED = jax.__version_info__ >= choose.FIRST_JAX


def interpreted(kernel: Callable[..., Any], plain: Callable[..., Any], *operands: Any) -> Any:
    """`kernel` on the operands in the interpreter, or `plain` where jax is too old for it."""
    if not INTERPRETED:
        return plain(*operands)
    # Private: jax has no public switch for kernels that do not take `interpret` themselves.
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    with force_gpu_interpret_mode():
        return kernel(*operands)
