"""The Hopper kernels without a GPU: in Pallas's interpreter, whose buffers begin as NaN.

It needs jax 0.12; with an older one what runs instead is called.  jax 0.10 never runs the kernels,
and a test holds that it chooses none.  0.11 runs them on GPUs, but its interpreter refuses a
barrier whose last phase one of the warpgroups need not wait for.
"""

from collections.abc import Callable
from typing import Any

import jax

INTERPRETED = jax.__version_info__ >= (0, 12)


def interpreted(kernel: Callable[..., Any], plain: Callable[..., Any], *operands: Any) -> Any:
    """`kernel` on the operands in the interpreter, or `plain` where jax is too old for it."""
    if not INTERPRETED:
        return plain(*operands)
    # Private: jax has no public switch for kernels that do not take `interpret` themselves.
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    with force_gpu_interpret_mode():
        return kernel(*operands)
