"""Runs the Hopper kernels without a GPU, in Pallas's interpreter, whose buffers start as NaN.

It needs jax 0.12; under an older jax the plain function is called instead.  jax 0.10 never uses the
kernels, which a test checks.  jax 0.11 uses them on GPUs, but its interpreter refuses a barrier
whose last phase one of the warpgroups does not wait for.
"""

from collections.abc import Callable
from typing import Any

import jax

INTERPRETED = jax.__version_info__ >= (0, 12)


def interpreted(kernel: Callable[..., Any], plain: Callable[..., Any], *operands: Any) -> Any:
    """Run `kernel` on the operands in the interpreter, or `plain` if jax is too old for that."""
    if not INTERPRETED:
        return plain(*operands)
    # Private: jax has no public switch for kernels that do not take `interpret` themselves.
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    with force_gpu_interpret_mode():
        return kernel(*operands)
