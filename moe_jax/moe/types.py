"""What routers and dispatch paths hand to each other.

Axes: G routing groups, R rows in a group, T positions in a row, S = R*T tokens in a group (row
after row), E experts, K choices a token, D model width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_jax.moe.dispatch_types import DispatchIn, Exchange, Experts, LayerSizes


class Mean(NamedTuple):
    """A mean kept as (sum, count), so that microbatches add both and divide once."""

    sum: Float[Array, "..."]
    count: Float[Array, "..."]

    def value(self) -> Float[Array, "..."]:
        """sum / count; 0 where nothing was counted."""
        return self.sum / jnp.maximum(self.count, 1)


class TokenChoice(NamedTuple):
    """Each token's experts.  `valid` says that the choice was sampled (GShard's second may not)."""

    ids_GSK: Int[Array, "G S K"]
    weights_GSK: Float[Array, "G S K"]
    valid_GSK: Bool[Array, "G S K"]


class ExpertChoice(NamedTuple):
    """Each expert's tokens (arXiv 2202.09368): slot c of expert e holds token ids_GEC of its group.

    A slot that points at a padding token stays empty.
    """

    ids_GEC: Int[Array, "G E C"]
    weights_GEC: Float[Array, "G E C"]

    def by_token(self, tokens: int) -> TokenChoice:
        """The same pairs with K = E: token s made choice e where expert e took it."""
        E = self.ids_GEC.shape[1]
        expert_E1 = jnp.arange(E)[:, None]

        def one_group(ids_EC, values_EC):
            empty_SE = jnp.zeros((tokens, E), values_EC.dtype)
            return empty_SE.at[ids_EC, expert_E1].set(values_EC)

        weights_GSE = jax.vmap(one_group)(self.ids_GEC, self.weights_GEC)
        valid_GSE = jax.vmap(one_group)(self.ids_GEC, jnp.ones_like(self.ids_GEC, bool))
        ids_GSE = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), weights_GSE.shape)
        return TokenChoice(ids_GSE, weights_GSE, valid_GSE)


class RouterAux(NamedTuple):
    """A router's losses and statistics over real tokens, unweighted."""

    balance: Mean  # 1 when balanced, whatever the router
    z: Mean  # mean squared logsumexp (ST-MoE, arXiv 2202.08906)
    entropy: Mean  # nats, of each token's distribution over experts


class Fates(NamedTuple):
    """What became of assignments; each one is in exactly one field.

    Arrays of one shape: of JAX, or of NumPy once they were read.
    """

    kept: Any
    dropped_capacity: Any  # the expert's slots in the group were taken
    dropped_buffer: Any  # a smaller receive buffer overflowed (dropless)
    unsampled: Any  # the router did not sample this choice
    padding: Any  # the token is padding

    def total(self) -> Any:
        """All of them."""
        return self.wanted() + self.unsampled + self.padding

    def wanted(self) -> Any:
        """Sampled choices of real tokens."""
        return self.kept + self.dropped_capacity + self.dropped_buffer


class Ledger(NamedTuple):
    """int32 counts of fates along three axes; each adds up to the same assignments."""

    expert: Fates  # [*layers, E], the expert chosen (for a padding token too)
    position: Fates  # [*layers, POSITION_BUCKETS], the token's place in its row
    source: Fates  # [*layers, sources] of the data


class DispatchStats(NamedTuple):
    """What became of every assignment (int32 counts); `conserved` holds in every step."""

    assignments: Int[Array, "*layers"]  # from the choice's shape, not from what was counted
    fates: Fates
    lost_tokens: Int[Array, "*layers"]  # real tokens left with no expert at all

    def conserved(self) -> Any:
        """Whether every assignment is accounted for exactly once."""
        return self.fates.total() == self.assignments


class MoEAux(NamedTuple):
    """Everything one MoE layer reports; stacked over layers by the transformer."""

    router: RouterAux
    stats: DispatchStats
    ledger: Ledger

    @property
    def load_E(self) -> Any:
        """Sampled assignments of real tokens an expert, before any drop: [*layers, E]."""
        return self.ledger.expert.wanted()


@dataclasses.dataclass(frozen=True)
class RouterIn:
    """What a router sees.  `keys_GR`: one typed PRNG key a row, so noise is free of the mesh."""

    x_GSD: Float[Array, "G S D"]
    token_ids_GS: Int[Array, "G S"]
    mask_GS: Bool[Array, "G S"]  # real tokens
    keys_GR: jax.Array
    train: bool


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter a router asks the MoE module to own: shape, logical axes, init std."""

    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    std: float


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """Float32 router state of one layer: its shape and the value it starts from."""

    shape: tuple[int, ...]
    initial: float = 0.0


Choice = TokenChoice | ExpertChoice


def token_choice(choice: Choice, tokens: int) -> tuple[TokenChoice, int | None]:
    """The choice as dispatch paths take it, and the slots an expert fills where it chose itself."""
    if isinstance(choice, ExpertChoice):
        return choice.by_token(tokens), choice.ids_GEC.shape[2]
    return choice, None


@runtime_checkable  # so that signatures can be checked in tests
class Router(Protocol):
    """Frozen dataclass of its own knobs; owns no parameters, no state and no transport."""

    @property
    def choices(self) -> int:
        """K, the choices a token makes (on average, where experts choose)."""
        ...

    @property
    def causal(self) -> bool:
        """Whether a token's experts depend on no later token."""
        ...

    @property
    def random(self) -> bool:
        """Whether it draws from `RouterIn.keys_GR` in training."""
        ...

    def param_specs(self, width: int, num_experts: int) -> dict[str, ParamSpec]:
        """Parameters it needs, by name."""
        ...

    def state_specs(self, num_experts: int) -> dict[str, StateSpec]:
        """What one layer carries from step to step beside parameters, by name."""
        ...

    def route(
        self,
        inputs: RouterIn,
        params: Mapping[str, jax.Array],
        state: Mapping[str, jax.Array],
    ) -> tuple[Choice, RouterAux]:
        """Choose experts for every token, padding included (dispatch ignores those)."""
        ...

    def next_state(
        self, state: Mapping[str, jax.Array], load_LE: Int[Array, "L E"]
    ) -> dict[str, jax.Array]:
        """State after a step, of L layers at once (leading axis).

        `load_LE` counts the whole batch: all microbatches, all devices.
        """
        ...


@runtime_checkable
class Dispatch(Protocol):
    """Frozen dataclass of its own knobs; owns no parameters.

    It answers for itself: what others have to know of a path (the planner, the held-out
    evaluation, the start-up log) they ask it, and never compare its name.

    Dispatch and combine are one call because the combine weights enter between them: the experts
    take each row's weight before their second matmul (`weighs_hidden`), so that what they make is
    in no derivative.
    """

    @property
    def drop_cause(self) -> str:
        """The field of Fates that counts what it drops."""
        ...

    @property
    def drops(self) -> bool:
        """Whether a sampled choice of a real token may not reach its expert."""
        ...

    @property
    def grouped(self) -> bool:
        """Whether the experts multiply rows sorted by expert, without slots (`Experts.grouped`)."""
        ...

    @property
    def weighs_hidden(self) -> bool:
        """Whether the experts take the rows' weights before their second matmul.

        Otherwise the combine weighs what they make, which the backward pass then needs.
        """
        ...

    def lookahead(self, sizes: LayerSizes) -> str:
        """The knob by which a later token may evict an earlier one; empty where none does."""
        ...

    def buffer_rows(self, sizes: LayerSizes) -> int:
        """Rows of the buffer in which the experts of one device find their tokens, in training."""
        ...

    def exchange(self, sizes: LayerSizes) -> Exchange | None:
        """How tokens travel between expert shards in training; None where none do."""
        ...

    def capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> int | None:
        """Slots an expert has for a group of `tokens` tokens; None when nothing is bounded."""
        ...

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: Experts, inputs: DispatchIn
    ) -> tuple[jax.Array, jax.Array]:
        """y_GSD = sum over a token's kept choices of weight * expert(x), and kept_GSK (bool)."""
        ...


@dataclasses.dataclass(frozen=True)
class MoEContext:
    """What every MoE layer of a forward pass shares; a pytree (mesh, rows, train are static).

    `router_state` has a leading axis over MoE layers, and none inside a layer.
    """

    token_ids_BT: Int[Array, "B T"]
    mask_BT: Bool[Array, "B T"]
    row_keys_B: jax.Array  # typed PRNG keys: fold(seed, step, row, layer)
    mesh: (
        Mesh | AbstractMesh | None
    )  # with the axes of parallel/mesh.py; None: XLA splits the layer
    train: bool
    group_rows: int = 0  # rows in a routing group; 0: those of the layer's own config
    router_state: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    sources_BT: Int[Array, "B T"] | None = None  # of the data, below num_sources; None: all 0
    num_sources: int = 1


jax.tree_util.register_dataclass(
    MoEContext,
    data_fields=["token_ids_BT", "mask_BT", "row_keys_B", "router_state", "sources_BT"],
    meta_fields=["mesh", "group_rows", "train", "num_sources"],
)
