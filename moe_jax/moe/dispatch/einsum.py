"""GShard's one-hot formulation (Lepikhin et al., arXiv 2006.16668): the readable reference.

Axes: G routing groups, S tokens per group, K assignments per token, N = S*K assignments per group,
E experts, C slots per expert per group, D width.

Dispatch and combine are einsums with [G, S, E, C] masks, summed over K from [G, S, K, E, C].
Memory and time grow with E * C, so the path is for reading and for checking the faster paths.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.moe.dispatch.bounded import BoundedDispatch, PriorityOrder, routed_ids
from moe_jax.moe.dispatch_types import DispatchIn, ExpertFunctions
from moe_jax.moe.types import TokenChoice
from moe_jax.parallel.mesh import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class Einsum(BoundedDispatch):
    """One-hot dispatch and combine, with the capacity and the drop order of bounded.py.

    Reference: GShard, arXiv 2006.16668.
    """

    @property
    def weighs_hidden(self) -> bool:
        """False: the combine einsum applies the weights."""
        return False

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: ExpertFunctions, inputs: DispatchIn
    ) -> tuple[jax.Array, jax.Array]:
        """See `types.Dispatch`."""
        G, S, D = x_GSD.shape
        K, E = choice.ids_GSK.shape[2], experts.num_experts
        C = self.slots(S, K, E, inputs)
        ids_GN = routed_ids(choice, inputs.mask_GS, E)
        tokens_GS = self.first_tokens(choice, inputs.mask_GS)
        order = PriorityOrder(self.priority, inputs.rows, K, tokens_GS)
        in_order_GNE = jax.nn.one_hot(order.take(ids_GN), E, dtype=jnp.int32)
        rank_GN = ((jnp.cumsum(in_order_GNE, axis=1) - 1) * in_order_GNE).sum(-1)
        rank_GN = order.undo(rank_GN)
        kept_GSK = ((ids_GN < E) & (rank_GN < C)).reshape(G, S, K)

        slot_GSKEC = (
            jax.nn.one_hot(choice.ids_GSK, E, dtype=x_GSD.dtype)[..., None]
            * jax.nn.one_hot(rank_GN.reshape(G, S, K), C, dtype=x_GSD.dtype)[..., None, :]
            * kept_GSK[..., None, None].astype(x_GSD.dtype)
        )
        dispatch_GSEC = slot_GSKEC.sum(2)
        weights_GSK = choice.weights_GSK.astype(x_GSD.dtype)
        combine_GSEC = jnp.einsum("gsk,gskec->gsec", weights_GSK, slot_GSKEC)

        # Split by groups, then by experts, then by groups again: each change is one all-to-all.
        by_groups = P(None, BATCH_AXES, None, None)
        by_experts = P("expert", ("data", "fsdp"), None, None)
        x_EGCD = jnp.einsum("gsec,gsd->egcd", dispatch_GSEC, x_GSD)
        x_EGCD = _split(x_EGCD, inputs.mesh, by_groups, by_experts)
        y_EGCD = experts.batched(x_EGCD.reshape(E, G * C, D)).reshape(E, G, C, D)
        y_EGCD = _split(y_EGCD, inputs.mesh, by_experts, by_groups)
        y_GSD = jnp.einsum("gsec,egcd->gsd", combine_GSEC, y_EGCD)
        return y_GSD, kept_GSK


def _split(x: jax.Array, mesh: Mesh | AbstractMesh | None, before: P, after: P) -> jax.Array:
    """Change the sharding of `x` from `before` to `after`; without a mesh XLA decides."""
    if mesh is None:
        return x
    for spec in (before, after):
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    return x
