"""Dispatch and combine by gathers, in the forward and the backward pass.

The transpose of a gather is a scatter-add, slow on every backend.  Dispatch and combine are
permutations with holes, so each one's backward pass is the other's forward pass: a gather by the
inverse index (also used by three libraries: MaxText, "simply" and EasyDeL).

Axes: N tokens, M buffer rows (slots or sorted rows), K assignments per token, G routing groups, D
width.  An index without a target is `M` (or `N`), one past the end, and reads as zero; without
`zero_fill`, padding rows are unspecified.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.ops.mosaic import choose
from moe_jax.parallel.collectives import varying_like


@dataclasses.dataclass(frozen=True)
class DispatchIndices:
    """The source of each buffer row, and the buffer row of each assignment."""

    token_M: Int[Array, "M"]  # the token in each buffer row; N: padding row
    assignment_M: Int[Array, "M"]  # assignment number n*K + k in each buffer row; N*K: padding row
    place_NK: Int[Array, "N K"]  # the buffer row of each assignment; M: dropped
    # True: padding rows are zero.  False: they may hold anything and must not reach a result.
    zero_fill: bool


jax.tree_util.register_dataclass(
    DispatchIndices, data_fields=["token_M", "assignment_M", "place_NK"], meta_fields=["zero_fill"]
)


def sort_by_expert(ids_GN: Int[Array, "G N"], num_experts: int) -> Int[Array, "G N"]:
    """Stable order of each group's assignments by expert; id `num_experts` (none) comes last.

    If they fit, expert and position share one integer: sorting single keys is several times faster
    than sorting pairs.
    """
    N = ids_GN.shape[1]
    if (num_experts + 1) * N >= 2**31:
        return jnp.argsort(ids_GN, axis=1, stable=True).astype(jnp.int32)
    keys_GN = ids_GN.astype(jnp.int32) * N + jnp.arange(N, dtype=jnp.int32)
    return jnp.sort(keys_GN, axis=1) % N


def _rows(x_ND, index):
    """x_ND[index]; zero if the index is one past the end."""
    return jnp.take(x_ND, index, axis=0, mode="fill", fill_value=0)


def _take_rows(x_ND, token_M, place_NK):
    """Read the token of each buffer row."""
    del place_NK
    return _rows(x_ND, token_M)


def _gathered_in_pairs(x_ND, token_M, place_NK):
    """`_take_rows`, with each pair of 2-byte numbers read as one integer.

    XLA's gather kernel then moves twice as many bytes per thread: 0.31 instead of 0.42 ms for
    131072 rows of 2048 on an H200.  It is slower if XLA fuses arithmetic into the kernel.
    """
    del place_NK
    N, D = x_ND.shape
    pairs_NP = jax.lax.bitcast_convert_type(x_ND.reshape(N, D // 2, 2), jnp.uint32)
    rows_MP = _rows(pairs_NP, token_M)
    return jax.lax.bitcast_convert_type(rows_MP, x_ND.dtype).reshape(token_M.shape[0], D)


def _spread(x_ND, token_M, place_NK):
    """Write each token, read once, to its buffer rows; padding rows are not written."""
    from moe_jax.ops.mosaic.spread import spread

    return varying_like(spread(x_ND, place_NK, token_M.shape[0]), x_ND)


def _on_nvidia(x_ND, zero_fill: bool):
    if not zero_fill and choose.supports_rows(x_ND):
        return _spread
    in_pairs = x_ND.dtype.itemsize == 2 and x_ND.shape[1] % 2 == 0
    return _gathered_in_pairs if in_pairs else _take_rows


@jax.custom_vjp
def gather_tokens(x_ND: Float[Array, "N D"], moves: DispatchIndices) -> Float[Array, "M D"]:
    """Copy tokens to their buffer rows; padding rows are as `moves.zero_fill` says."""
    operands = x_ND, moves.token_M, moves.place_NK
    fast = _on_nvidia(x_ND, moves.zero_fill)
    return jax.lax.platform_dependent(*operands, cuda=fast, default=_take_rows)


def _gather_forward(x_ND, moves):
    return gather_tokens(x_ND, moves), moves


def _gather_backward(moves, dx_MD):
    return combine(dx_MD, moves), _no_gradient(moves)


@jax.custom_vjp
def combine(y_MD: Float[Array, "M D"], moves: DispatchIndices) -> Float[Array, "N D"]:
    """Sum each token's buffer rows; dropped assignments add nothing."""
    # A loop over K keeps [N, K, D] out of memory.
    parts = [_rows(y_MD, moves.place_NK[:, k]) for k in range(moves.place_NK.shape[1])]
    return functools.reduce(jnp.add, parts)


def _combine_forward(y_MD, moves):
    return combine(y_MD, moves), moves


def _combine_backward(moves, dy_ND):
    return gather_tokens(dy_ND, moves), _no_gradient(moves)


@jax.custom_vjp
def gather_weights(weights_NK: Float[Array, "N K"], moves: DispatchIndices) -> Float[Array, "M"]:
    """The weight of the assignment in each buffer row; padding rows have weight 0."""
    return _numbers(weights_NK, moves.assignment_M)


def _weights_forward(weights_NK, moves):
    return gather_weights(weights_NK, moves), moves


def _weights_backward(moves, dweights_M):
    return _numbers(dweights_M, moves.place_NK), _no_gradient(moves)


gather_tokens.defvjp(_gather_forward, _gather_backward)
combine.defvjp(_combine_forward, _combine_backward)
gather_weights.defvjp(_weights_forward, _weights_backward)


def _numbers(values, index):
    """`values`, flattened, at `index`; zero if the index is one past the end."""
    return _rows(values.reshape(-1, 1), index.reshape(-1)).reshape(index.shape)


def _no_gradient(moves: DispatchIndices):
    """The gradient of integer inputs: float0 zeros, as custom_vjp demands."""
    return jax.tree.map(lambda i: np.zeros(i.shape, jax.dtypes.float0), moves)
