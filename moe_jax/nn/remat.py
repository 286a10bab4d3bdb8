"""Rematerialisation by name: what the backward pass of a block may keep.

The names below are tagged with `jax.ad_checkpoint.checkpoint_name` where the tensors are made,
by capacity and dropless dispatch alike; einsum and dense, the references, tag no dispatch.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import checkpoint_policies as policies

from moe_jax.registry import lookup

ATTENTION_OUT = "attention_out"  # output of attention before its projection
FFN_HIDDEN = "ffn_hidden"  # between the two matmuls of a dense FFN, before the activation
ROUTER_LOGITS = "router_logits"
MOE_DISPATCHED = "moe_dispatched"  # tokens where their experts are: after the all-to-all
MOE_HIDDEN = "moe_hidden"  # between the two matmuls of the experts, before the activation

_DISPATCH = (ROUTER_LOGITS, MOE_DISPATCHED)

# name -> policy; "none" keeps everything and so applies no checkpoint at all.
REMAT: dict[str, Any] = {
    "none": None,
    "full": policies.nothing_saveable,
    "dots": policies.dots_with_no_batch_dims_saveable,
    # Recomputes matmuls but never routes again and repeats no collective of the dispatch.
    "save_dispatch": policies.save_only_these_names(*_DISPATCH),
    "save_hidden": policies.save_only_these_names(
        *_DISPATCH, ATTENTION_OUT, FFN_HIDDEN, MOE_HIDDEN
    ),
}


def remat(function: Callable, name: str, *, scanned: bool) -> Callable:
    """`function` under policy `name`; raises UserError for an unknown one.

    Inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier that
    prevents it elsewhere is left out.
    """
    policy = lookup(REMAT, name, "model.remat")
    if name == "none":
        return function
    return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)
