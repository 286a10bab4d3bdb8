"""Estimates what one device computes, moves to and from HBM, and sends per step.

Used if the program is not compiled; the collectives of a compiled program are read from its text
(hlo.py).  D width, F expert width, U matrices into an expert, E experts, H query and J key/value
heads, A head width, T positions in a row.
"""

from moe_jax.parallel.mesh import AXES
from moe_jax.run.resolve import layer_sizes
from moe_jax.tools.plan.analytic import (
    DeviceSizes,
    local_sizes,
    moe_layers,
    passes_to_experts,
    state_bytes,
)
from moe_jax.tools.plan.lowering import Plan, split_ways
from moe_jax.tools.plan.roofline import Traffic

# By remat policy, the weights of a block whose matmuls the backward pass recomputes, because it
# needs their results and the policy does not save them.  An attention kernel is always recomputed,
# and so are the experts' outputs if the combine weighs them.
_RECOMPUTED = {
    "full": ("q_DHA", "k_DJA", "v_DJA", "o_HAD", "w_in_DF", "w_gate_DF", "w_in_EDUF"),
    "save_dispatch": ("q_DHA", "k_DJA", "v_DJA", "o_HAD", "w_in_DF", "w_gate_DF", "w_in_EDUF"),
    "save_hidden": ("q_DHA", "k_DJA", "v_DJA", "o_HAD"),
    "dots": ("w_in_EDUF",),
    "none": (),
}


def executed_flops(plan: Plan) -> float:
    """The FLOPs per step of one device's matmuls, with recomputation and empty slots."""
    config, model = plan.config, plan.config.model
    moe, T = model.moe, config.data.sequence_length
    again = _RECOMPUTED[model.remat]
    flops = plan.flops
    slots = 1.0  # slots per assignment
    parts = plan.model.components
    if parts is not None:
        if model.remat != "none" and not parts.dispatch.weighs_hidden:
            again += ("w_out_EFD",)
        sizes = layer_sizes(config)
        capacity = parts.dispatch.capacity(
            sizes.group_tokens, sizes.choices, sizes.experts, train=True
        )
        if capacity is not None:
            slots = capacity * moe.num_experts / (moe.group_rows * T * moe.top_k)
    for leaf in plan.leaves:
        used = leaf.size
        if "experts" in leaf.axes:
            used *= moe.top_k / moe.num_experts * slots
            flops += 6.0 * used * (1 - 1 / slots)
        if leaf.name in again:
            flops += 2.0 * used
    if model.remat != "none":
        flops += 2.0 * model.num_layers * T * model.num_heads * model.head_dim
    return flops * plan.tokens / plan.mesh.size


def moved_bytes(plan: Plan) -> float:
    """The bytes per step between one device and its HBM that no fusion avoids.

    These are the state, read and written once, and every weight in the compute dtype for each pass
    of each microbatch.
    """
    parameters, copies, optimizer = state_bytes(plan)
    passes = 3 + (plan.config.model.remat != "none")
    c = local_sizes(plan).c
    sizes = plan.mesh.shape
    weights = sum(
        leaf.size * c / split_ways(leaf.axes, sizes, ("expert", "tensor")) for leaf in plan.leaves
    )
    again = plan.config.train.accumulation
    return 2 * (parameters + optimizer) + copies + 2 * parameters + passes * weights * again


def traffic(plan: Plan) -> list[Traffic]:
    """Estimate the bytes that one device sends per step."""
    local = local_sizes(plan)
    return [*_weights(plan, local), *_tokens(plan, local), *_tensor(plan, local)]


def _weights(plan: Plan, local: DeviceSizes) -> list[Traffic]:
    """The traffic of gathering weights over fsdp, and of reducing gradients."""
    sizes, again = local.sizes, plan.config.train.accumulation
    gathers = 2  # in the forward and in the backward pass of the layer
    found = []
    for leaf in plan.leaves:
        used = {axis for axis in AXES if split_ways(leaf.axes, dict.fromkeys(AXES, 2), (axis,)) > 1}
        whole = leaf.size * local.c / split_ways(leaf.axes, sizes, ("expert", "tensor"))
        if "fsdp" in used and (n := sizes["fsdp"]) > 1:
            found.append(Traffic("all-gather", "fsdp", again * gathers * whole * (n - 1) / n))
            found.append(Traffic("reduce-scatter", "fsdp", again * whole * (n - 1) / n))
        over = [axis for axis in ("data", "fsdp", "expert") if axis not in used and sizes[axis] > 1]
        n = 1
        for axis in over:
            n *= sizes[axis]
        if n > 1:
            part = whole / (sizes["fsdp"] if "fsdp" in used else 1)
            found.append(Traffic("all-reduce", " x ".join(over), again * 2 * part * (n - 1) / n))
    return found


def _tokens(plan: Plan, local: DeviceSizes) -> list[Traffic]:
    """The traffic of dispatch and combine, forward and backward."""
    model, exchange, n = local.model, local.exchange, local.sizes["expert"]
    if exchange is None or local.dispatch is None:
        return []
    there, back = passes_to_experts(local)
    again = moe_layers(model) * plan.config.train.accumulation
    a_row = model.width * local.c
    weights = there * 4 if local.dispatch.weighs_hidden else 0  # bytes sent with each token
    if exchange.dispatch == "all-gather":
        sent = again * (n - 1) * exchange.rows
        return [
            Traffic("all-gather", "expert", there * sent * a_row),
            Traffic("reduce-scatter", "expert", back * sent * a_row),
        ]
    sent = again * exchange.rows * (n - 1) / n
    return [Traffic("all-to-all", "expert", sent * ((there + back) * a_row + weights))]


def _tensor(plan: Plan, local: DeviceSizes) -> list[Traffic]:
    """The traffic of sums over tensor, after attention and FFN, forward and backward."""
    n, model = local.sizes["tensor"], local.model
    if n == 1:
        return []
    # Remat repeats the sum of attention only, because no backward rule needs the FFN's output.
    times = 4 + (model.remat != "none")
    stream = local.N * model.width * local.c
    again = plan.config.train.accumulation
    bytes_ = again * model.num_layers * times * 2 * stream * (n - 1) / n
    return [Traffic("all-reduce", "tensor", bytes_)]
