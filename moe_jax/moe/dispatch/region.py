"""The shard_map region in which the expert-parallel dispatch paths run.

It is manual over every mesh axis.  Weights enter split over `expert` and `tensor` (pjit all-gathers
their fsdp shards at the border), tokens split over the batch axes.  Inside, only the path's own
exchange communicates over `expert`.  One psum over `tensor` completes the down projection; it comes
after the combine, because a token's sum is one row and its outputs are K rows.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from moe_jax.moe.dispatch_types import DispatchIn, ExpertFunctions
from moe_jax.moe.types import TokenChoice
from moe_jax.parallel.collectives import varying
from moe_jax.parallel.mesh import AXES, BATCH_AXES

# body(x_GSD, choice, experts, mask_GS, *by_group) -> (y_GSD, kept_GSK), all of one device
Body = Callable[..., tuple[jax.Array, jax.Array]]


def expert_region(
    body: Body,
    x_GSD: jax.Array,
    choice: TokenChoice,
    experts: ExpertFunctions,
    inputs: DispatchIn,
    *by_group: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Run `body` on each device's groups and experts; sum its outputs over tensor shards.

    Without a mesh `body` runs on all groups and experts, and XLA partitions it with the caller's
    code.  `by_group` holds integer arrays [G, ...] that only this path needs.
    """
    if inputs.mesh is None:
        return body(x_GSD, choice, experts, inputs.mask_GS, *by_group)
    groups = P(BATCH_AXES)

    def local(x_GSD, choice, experts, mask_GS, *by_group):
        # Mark inputs that have gradients as varying over every axis, so that each gradient is
        # reduced once, at this border.
        x_GSD, experts = varying((x_GSD, experts), AXES)
        choice = choice._replace(weights_GSK=varying(choice.weights_GSK, AXES))
        y_GSD, kept_GSK = body(x_GSD, choice, experts, mask_GS, *by_group)
        return jax.lax.psum(y_GSD, "tensor"), kept_GSK

    return jax.shard_map(
        local,
        mesh=inputs.mesh,
        in_specs=(groups, groups, experts.border_specs(), groups, *(groups for _ in by_group)),
        out_specs=(groups, groups),
    )(x_GSD, choice, experts, inputs.mask_GS, *by_group)
