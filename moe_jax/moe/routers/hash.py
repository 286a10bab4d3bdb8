"""Hash layers (Roller et al., arXiv 2106.04426): a fixed table from token id to experts."""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import bounds
from moe_jax.bounds import Rule, at_least
from moe_jax.decides import Weights
from moe_jax.errors import UserError
from moe_jax.moe.balance import balance_loss
from moe_jax.moe.types import Mean, ParamSpec, RouterAux, RouterIn, StateSpec, TokenChoice


@dataclasses.dataclass(frozen=True)
class Hash:
    """K experts a token id, by a balanced random table, with weights 1 / K.

    The table gives every expert equally many of its `table_size` ids; larger ids wrap.  There is
    nothing to learn and nothing depends on the activations.

    Raises:
      UserError: a table smaller than the number of experts, or a negative seed.

    Reference: Roller et al., arXiv 2106.04426.
    """

    num_experts: int = 8  # E, routed experts
    top_k: int = 2  # K, experts per token
    balance_scope: str = "group"  # over which tokens balance is measured: group | row | global
    # Token ids in the table, best the size of the vocabulary.
    table_size: Weights[Annotated[int, Rule("num_experts or more")]] = 65536
    seed: Weights[Annotated[int, at_least(0)]] = 0  # of the table; 0 is one as any

    def __post_init__(self):
        option = "model.moe.options.hash"
        bounds.check(self, f"{option}.")
        if self.table_size < self.num_experts:
            raise UserError(
                f"{option}.table_size is {self.table_size}: set num_experts ({self.num_experts}) "
                f"or more, best the size of the vocabulary."
            )

    @property
    def choices(self) -> int:
        """K, the experts of a token."""
        return self.top_k

    @property
    def causal(self) -> bool:
        """Each token's id alone decides."""
        return True

    @property
    def random(self) -> bool:
        """Its table was drawn once."""
        return False

    def param_specs(self, width: int, num_experts: int) -> dict[str, ParamSpec]:
        """None."""
        return {}

    def state_specs(self, num_experts: int) -> dict[str, StateSpec]:
        """None."""
        return {}

    def next_state(self, state, load_LE):
        """Nothing to change."""
        return dict(state)

    def route(self, inputs: RouterIn, params, state):
        """Look the token ids up; see `types.Router`."""
        K, E = self.top_k, self.num_experts
        dtype = jnp.promote_types(inputs.x_GSD.dtype, jnp.float32)
        table_VK = jnp.asarray(expert_table(self.table_size, E, K, self.seed))
        ids_GSK = table_VK[inputs.token_ids_GS % self.table_size]
        probs_GSE = jax.nn.one_hot(ids_GSK, E, dtype=dtype).mean(-2)
        balance = balance_loss(
            probs_GSE,
            ids_GSK,
            inputs.mask_GS,
            scope=self.balance_scope,
            rows=inputs.keys_GR.shape[1],
        )
        nothing = Mean(jnp.zeros((), dtype), inputs.mask_GS.sum(dtype=dtype))
        weights_GSK = jnp.full(ids_GSK.shape, 1 / K, dtype)
        choice = TokenChoice(ids_GSK, weights_GSK, jnp.ones(ids_GSK.shape, bool))
        return choice, RouterAux(balance, z=nothing, entropy=nothing)


@functools.lru_cache
def expert_table(table_size: int, num_experts: int, choices: int, seed: int) -> np.ndarray:
    """int32 [table_size, K]: K different experts an id, each expert as often as any other (+-1).

    The ids are shuffled into blocks of E.  The k-th experts of a block are its members' numbers
    turned by the block's k-th shift, so that every expert comes once for each k.
    """
    # Sorted raw bits: NumPy keeps those, not its permutations, the same in every version.
    bits = np.random.PCG64(seed).random_raw
    blocks = -(-table_size // num_experts)
    number_V = np.argsort(bits(table_size), kind="stable")
    shift_BE = np.argsort(bits(blocks * num_experts).reshape(blocks, -1), axis=1, kind="stable")
    shift_VK = shift_BE[number_V // num_experts, :choices]
    table_VK = (number_V[:, None] + shift_VK) % num_experts
    return table_VK.astype(np.int32)
