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

    sum: Float[Array, "..."]  # over what was counted
    count: Float[Array, "..."]  # of tokens, 0 or more

    def value(self) -> Float[Array, "..."]:
        """The mean.

        Returns:
          sum / count; 0 where nothing was counted.
        """
        return self.sum / jnp.maximum(self.count, 1)


class TokenChoice(NamedTuple):
    """The experts of each token.  GShard samples the second of them, so a choice may be invalid."""

    ids_GSK: Int[Array, "G S K"]  # experts, 0 to E - 1
    weights_GSK: Float[Array, "G S K"]  # by which their outputs are added up
    valid_GSK: Bool[Array, "G S K"]  # False: not sampled, counted as `unsampled`


class ExpertChoice(NamedTuple):
    """The tokens of each expert: slot c of expert e holds token ids_GEC of its group.

    A slot that points at a padding token stays empty.

    Reference: Zhou et al., arXiv 2202.09368.
    """

    ids_GEC: Int[Array, "G E C"]  # tokens of the group, 0 to S - 1
    weights_GEC: Float[Array, "G E C"]  # by which the expert's outputs are added up

    def by_token(self, tokens: int) -> TokenChoice:
        """The same pairs with K = E: token s made choice e where expert e took it.

        Args:
          tokens: S, tokens in a group.

        Returns:
          Arrays [G, S, E]; a choice is valid where the expert took the token.
        """
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

    kept: Any  # the assignment reached its expert
    dropped_capacity: Any  # the expert's slots in the group were taken
    dropped_buffer: Any  # a smaller receive buffer overflowed (dropless)
    unsampled: Any  # the router did not sample this choice
    padding: Any  # the token is padding

    def total(self) -> Any:
        """The assignments in all fields.

        Returns:
          Counts of the fields' shape.
        """
        return self.wanted() + self.unsampled + self.padding

    def wanted(self) -> Any:
        """Sampled choices of real tokens, kept or dropped.

        Returns:
          Counts of the fields' shape.
        """
        return self.kept + self.dropped_capacity + self.dropped_buffer


class Ledger(NamedTuple):
    """int32 counts of fates along three axes; each adds up to the same assignments."""

    expert: Fates  # [*layers, E], the expert chosen (for a padding token too)
    position: Fates  # [*layers, POSITION_BUCKETS], the token's place in its row
    source: Fates  # [*layers, sources] of the data


class DispatchStats(NamedTuple):
    """What became of every assignment (int32 counts); `conserved` holds in every step."""

    assignments: Int[Array, "*layers"]  # from the choice's shape, not from what was counted
    fates: Fates  # [*layers], summed over experts
    lost_tokens: Int[Array, "*layers"]  # real tokens left with no expert at all

    def conserved(self) -> Any:
        """True where every assignment is accounted for exactly once.

        Returns:
          bool [*layers].
        """
        return self.fates.total() == self.assignments


class MoEAux(NamedTuple):
    """Everything one MoE layer reports; stacked over layers by the transformer."""

    router: RouterAux  # losses and entropy
    stats: DispatchStats  # counts of assignments
    ledger: Ledger  # the same counts by expert, position and source

    @property
    def load_E(self) -> Any:
        """Sampled assignments of real tokens an expert, before any drop: [*layers, E]."""
        return self.ledger.expert.wanted()


@dataclasses.dataclass(frozen=True)
class RouterIn:
    """The tokens of one MoE layer in their routing groups, as a router takes them."""

    x_GSD: Float[Array, "G S D"]  # tokens of width D, in the compute dtype
    token_ids_GS: Int[Array, "G S"]  # vocabulary ids, for routers that read them
    mask_GS: Bool[Array, "G S"]  # real tokens
    keys_GR: jax.Array  # a typed PRNG key per row, so that noise does not depend on the mesh
    train: bool  # False: no noise


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter that a router asks the MoE module to own."""

    shape: tuple[int, ...]  # sizes of its axes
    logical_axes: tuple[str | None, ...]  # names of parallel/rules.py; None: not split
    std: float  # of the truncated normal that it starts from


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """Float32 router state of one layer."""

    shape: tuple[int, ...]  # sizes of its axes
    initial: float = 0.0  # the value it starts from, 0 for a bias


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
        """Parameters that one layer needs.

        Args:
          width: D, of the tokens.
          num_experts: E, routed experts.

        Returns:
          Name -> ParamSpec; empty: none.
        """
        ...

    def state_specs(self, num_experts: int) -> dict[str, StateSpec]:
        """State that one layer carries from step to step beside parameters.

        Args:
          num_experts: E, routed experts.

        Returns:
          Name -> StateSpec; empty: none.
        """
        ...

    def route(
        self,
        inputs: RouterIn,
        params: Mapping[str, jax.Array],
        state: Mapping[str, jax.Array],
    ) -> tuple[Choice, RouterAux]:
        """Choose experts for every token, padding included (dispatch ignores it).

        Args:
          inputs: tokens, mask and keys of one layer.
          params: arrays by the names of `param_specs`.
          state: arrays by the names of `state_specs`.

        Returns:
          The choice, with weights in float32 or wider, and losses over real tokens.
        """
        ...

    def next_state(
        self, state: Mapping[str, jax.Array], load_LE: Int[Array, "L E"]
    ) -> dict[str, jax.Array]:
        """State after a step.

        Args:
          state: arrays by the names of `state_specs`, with a leading axis over L layers.
          load_LE: sampled assignments per expert in the whole batch: all microbatches and devices.

        Returns:
          The new state, of the same shapes.
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
        """The knob by which a later token may evict an earlier one.

        Args:
          sizes: of one layer in a microbatch.

        Returns:
          Its name and value, such as `priority choice`; empty: no later token can.
        """
        ...

    def buffer_rows(self, sizes: LayerSizes) -> int:
        """Rows of the buffer in which the experts of one device find their tokens, in training.

        Args:
          sizes: of one layer in a microbatch.

        Returns:
          A number of rows of width D.
        """
        ...

    def exchange(self, sizes: LayerSizes) -> Exchange | None:
        """The communication between expert shards in training.

        Args:
          sizes: of one layer in a microbatch.

        Returns:
          The collectives and their rows; None: no token leaves its device.
        """
        ...

    def capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> int | None:
        """Slots that an expert has in a routing group.

        Args:
          tokens: S, tokens in the group.
          choices: K, choices per token.
          num_experts: E, of all shards.
          train: the capacity factor is that of training, not of evaluation.

        Returns:
          C; None: nothing is bounded per expert.
        """
        ...

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: Experts, inputs: DispatchIn
    ) -> tuple[jax.Array, jax.Array]:
        """Send tokens to their experts and add up what these make of them.

        Args:
          x_GSD: tokens of width D.
          choice: experts and weights of each token (K = E where experts choose).
          experts: the weights of those that this device holds, or of all.
          inputs: mask, mesh and mode.

        Returns:
          y_GSD, the sum over a token's kept choices of weight * expert(x), and kept_GSK (bool),
          the assignments that reached their expert.
        """
        ...


@dataclasses.dataclass(frozen=True)
class MoEContext:
    """What every MoE layer of a forward pass shares; a pytree (mesh, rows, train are static)."""

    token_ids_BT: Int[Array, "B T"]  # below the vocabulary's size
    mask_BT: Bool[Array, "B T"]  # real tokens
    row_keys_B: jax.Array  # typed PRNG keys: fold(seed, step, row, layer)
    mesh: (
        Mesh | AbstractMesh | None
    )  # with the axes of parallel/mesh.py; None: XLA splits the layer
    train: bool  # capacity, noise and dropout are those of training
    group_rows: int = 0  # rows in a routing group; 0: those of the layer's own config
    # Name -> [MoE layers, ...]; inside a layer without that axis.  Empty: the router keeps none.
    router_state: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    sources_BT: Int[Array, "B T"] | None = None  # of the data, below num_sources; None: all 0
    num_sources: int = 1  # of the data, for the ledger


jax.tree_util.register_dataclass(
    MoEContext,
    data_fields=["token_ids_BT", "mask_BT", "row_keys_B", "router_state", "sources_BT"],
    meta_fields=["mesh", "group_rows", "train", "num_sources"],
)
