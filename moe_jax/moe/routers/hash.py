"""Hash layers (Roller et al., arXiv 2106.04426): a fixed table from token id to experts.

Axes: G routing groups, S tokens per group, E experts, K assignments per token, V ids in the table,
B blocks of E ids.
"""

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
    """K experts per token id from a balanced random table, with weights 1 / K.

    For each k, the table gives all experts equally many of its `table_size` ids, to within one;
    larger ids wrap around.  The router has no parameters and does not read the activations.

    Raises:
      UserError: a table smaller than the number of experts, or a negative seed.

    Reference: Roller et al., arXiv 2106.04426.
    """

    num_experts: int = 8  # E, routed experts
    top_k: int = 2  # K, experts per token
    balance_scope: str = "group"  # tokens over which balance is measured: group | row | global
    # Token ids in the table; ideally the vocabulary size.
    table_size: Weights[Annotated[int, Rule("num_experts or more")]] = 65536
    seed: Weights[Annotated[int, at_least(0)]] = 0  # of the random table; 0 is as good as any

    def __post_init__(self):
        option = "model.moe.options.hash"
        bounds.check(self, f"{option}.")
        if self.table_size < self.num_experts:
            raise UserError(
                f"{option}.table_size is {self.table_size}: set num_experts ({self.num_experts}) "
                f"or more, ideally the vocabulary size."
            )

    @property
    def choices_per_token(self) -> int:
        """K, experts per token."""
        return self.top_k

    @property
    def balanced_by_loss(self) -> bool:
        """False: the load follows from the text."""
        return False

    @property
    def causal(self) -> bool:
        """True: a token's experts depend on its id alone."""
        return True

    @property
    def random(self) -> bool:
        """False: the table is fixed by `seed`."""
        return False

    def param_specs(self, width: int, num_experts: int) -> dict[str, ParamSpec]:
        """Empty: the router has no parameters."""
        return {}

    def state_specs(self, num_experts: int) -> dict[str, StateSpec]:
        """Empty: the router keeps no state."""
        return {}

    def next_state(self, state, load_LE):
        """Return the state unchanged."""
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
    """The table [table_size, K], int32: K different experts per id.

    For each k, the numbers of ids per expert differ by at most 1.  The ids are shuffled into blocks
    of E.  The k-th expert of an id is its number plus the k-th shift of its block, modulo E, so in
    a whole block every expert is k-th once.
    """
    # The shuffle sorts raw random bits, because NumPy keeps those the same in every version, but
    # not its permutations.
    bits = np.random.PCG64(seed).random_raw
    blocks = -(-table_size // num_experts)
    number_V = np.argsort(bits(table_size), kind="stable")
    shift_BE = np.argsort(bits(blocks * num_experts).reshape(blocks, -1), axis=1, kind="stable")
    shift_VK = shift_BE[number_V // num_experts, :choices]
    table_VK = (number_V[:, None] + shift_VK) % num_experts
    return table_VK.astype(np.int32)
