"""Rematerialization policies by name: which tensors of a block are saved for the backward pass.

`jax.ad_checkpoint.checkpoint_name` tags the tensors with the names below where they are computed.
Both capacity and dropless dispatch tag theirs; einsum and dense, the references, do not.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import checkpoint_policies as policies

from moe_jax.registry import lookup

ATTENTION_OUT = "attention_out"  # output of attention, before its projection
FFN_HIDDEN = "ffn_hidden"  # first matmul's output in a dense FFN, before the activation
ROUTER_LOGITS = "router_logits"
MOE_DISPATCHED = "moe_dispatched"  # dispatched tokens (after the all-to-all), and their indices
MOE_HIDDEN = "moe_hidden"  # first matmul's output in the experts, before the activation

_DISPATCH = (ROUTER_LOGITS, MOE_DISPATCHED)

# name -> policy; "none" saves everything, so it applies no checkpoint at all.
REMAT: dict[str, Any] = {
    "none": None,
    "full": policies.nothing_saveable,
    "dots": policies.dots_with_no_batch_dims_saveable,
    # Recomputes matmuls, but neither the routing nor a collective of the dispatch.
    "save_dispatch": policies.save_only_these_names(*_DISPATCH),
    "save_hidden": policies.save_only_these_names(
        *_DISPATCH, ATTENTION_OUT, FFN_HIDDEN, MOE_HIDDEN
    ),
}


def remat(function: Callable, name: str, *, scanned: bool) -> Callable:
    """Apply the remat policy `name` to `function`; raises UserError for an unknown name.

    The barrier that keeps XLA from merging the recomputation with the forward pass is left out
    inside a scan, where XLA cannot merge them.
    """
    policy = lookup(REMAT, name, "model.remat")
    if name == "none":
        return function
    return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)
