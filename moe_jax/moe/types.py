"""The protocols of routers and dispatch paths, and the types that they exchange.

Axes: B rows, T positions per row, G routing groups, R rows per group, S = R*T tokens per group (row
after row), E experts, K assignments per token, C slots per expert per group, D model width, L MoE
layers.  Real tokens are those that are not padding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_jax.moe.dispatch_types import DispatchIn, Exchange, ExpertFunctions, LayerSizes


class Mean(NamedTuple):
    """A mean kept as (sum, count), so that microbatches add both and divide once."""

    sum: Float[Array, "..."]  # over the counted tokens
    count: Float[Array, "..."]  # number of tokens, 0 or more

    def value(self) -> Float[Array, "..."]:
        """The mean.

        Returns:
          sum / count; 0 if the count is 0.
        """
        return self.sum / jnp.maximum(self.count, 1)


class TokenChoice(NamedTuple):
    """The experts of each token; GShard samples the second, so an assignment may be unsampled."""

    ids_GSK: Int[Array, "G S K"]  # experts, 0 to E - 1
    weights_GSK: Float[Array, "G S K"]  # of the experts' outputs in the token's sum
    valid_GSK: Bool[Array, "G S K"]  # False: unsampled


class ExpertChoice(NamedTuple):
    """The tokens of each expert: slot c of expert e holds token ids_GEC of its group.

    A slot whose token is padding stays empty.

    Reference: Zhou et al., arXiv 2202.09368.
    """

    ids_GEC: Int[Array, "G E C"]  # tokens of the group, 0 to S - 1
    weights_GEC: Float[Array, "G E C"]  # of the expert's outputs in the tokens' sums

    def by_token(self, tokens: int) -> TokenChoice:
        """Convert to a TokenChoice with K = E: assignment e of a token is to expert e.

        Args:
          tokens: S, tokens per group.

        Returns:
          Arrays [G, S, E]; an assignment is valid if the expert took the token.
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

    balance: Mean  # balance loss: 1 when balanced, for every router
    z: Mean  # mean squared logsumexp (ST-MoE, arXiv 2202.08906)
    entropy: Mean  # of each token's distribution over experts, in nats
    probs: Mean | None = None  # of each expert [*layers, E]; None: `balance_layers` is not pooled


class Outcomes(NamedTuple):
    """The outcomes of assignments, as masks or counts; each assignment has exactly one outcome.

    The fields have the same shape: JAX arrays, or NumPy arrays after they were read from a device.
    """

    kept: Any  # computed by its expert
    dropped_capacity: Any  # dropped: all slots of the expert in the group were taken
    dropped_buffer: Any  # dropped: a bounded receive buffer overflowed (dropless)
    unsampled: Any  # the router drew not to make the assignment
    padding: Any  # the token is padding

    def total(self) -> Any:
        """The number of assignments in all fields.

        Returns:
          Counts of the fields' shape.
        """
        return self.sampled() + self.unsampled + self.padding

    def sampled(self) -> Any:
        """The number of sampled assignments of real tokens, kept or dropped.

        Returns:
          Counts of the fields' shape.
        """
        return self.kept + self.dropped_capacity + self.dropped_buffer


class Ledger(NamedTuple):
    """Counts of outcomes (int32) along three axes, each over the same assignments."""

    expert: Outcomes  # [*layers, E], by the expert chosen (by padding tokens, too)
    position: Outcomes  # [*layers, POSITION_BUCKETS], by the token's position in its row
    source: Outcomes  # [*layers, sources], by data source


class DispatchStats(NamedTuple):
    """The outcomes of all assignments (int32 counts); `conserved` holds in every step."""

    assignments: Int[Array, "*layers"]  # from the choice's shape, independent of the counts
    outcomes: Outcomes  # [*layers], summed over experts
    lost_tokens: Int[Array, "*layers"]  # real tokens without a kept assignment
    kept_weight_sum: Float[Array, "*layers"]  # sum of the weights of kept assignments

    def conserved(self) -> Any:
        """True if every assignment is counted exactly once.

        Returns:
          bool [*layers].
        """
        return self.outcomes.total() == self.assignments


class BranchScale(NamedTuple):
    """Sums of squares over the real tokens at every SCALE_STRIDE-th position (accounting.py)."""

    branch: Float[Array, "*layers"]  # of an MoE layer's output
    residual: Float[Array, "*layers"]  # of the residual stream to which it is added


class MoEAux(NamedTuple):
    """Everything one MoE layer reports; stacked over layers by the transformer."""

    router: RouterAux  # losses and entropy
    stats: DispatchStats  # counts of assignments
    ledger: Ledger  # the same counts by expert, position and source
    scale: BranchScale | None = None  # of a layer in a model; None: the layer was called alone

    @property
    def load_E(self) -> Any:
        """Sampled assignments of real tokens per expert, before any drop: [*layers, E]."""
        return self.ledger.expert.sampled()


@dataclasses.dataclass(frozen=True)
class RouterIn:
    """The inputs of a router: the tokens of one MoE layer in their routing groups."""

    x_GSD: Float[Array, "G S D"]  # tokens of width D, in the compute dtype
    token_ids_GS: Int[Array, "G S"]  # vocabulary ids, for routers that read them
    mask_GS: Bool[Array, "G S"]  # True for real tokens, False for padding
    keys_GR: jax.Array  # a typed PRNG key per row, so that noise does not depend on the mesh
    train: bool  # False: no noise


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter that a router needs and the MoE module creates and owns."""

    shape: tuple[int, ...]  # sizes of its axes
    logical_axes: tuple[str | None, ...]  # names in parallel/rules.py; None: not split
    std: float  # of the truncated normal from which its initial value is drawn


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """The shape and initial value of an array of router state of one layer (float32 or wider)."""

    shape: tuple[int, ...]  # sizes of its axes
    initial: float = 0.0  # initial value of each element, 0 for a bias


Choice = TokenChoice | ExpertChoice


def token_choice(choice: Choice, tokens: int) -> tuple[TokenChoice, int | None]:
    """The choice by token, as dispatch paths take it, and C if experts chose (None: tokens did)."""
    if isinstance(choice, ExpertChoice):
        return choice.by_token(tokens), choice.ids_GEC.shape[2]
    return choice, None


@runtime_checkable  # so that tests can check signatures
class Router(Protocol):
    """A frozen dataclass of a router's knobs; it owns no parameters, no state and no buffers."""

    @property
    def choices_per_token(self) -> int:
        """K, assignments per token (on average, if experts choose tokens)."""
        ...

    @property
    def causal(self) -> bool:
        """True if no later token affects a token's experts."""
        ...

    @property
    def random(self) -> bool:
        """True if it draws from `RouterIn.keys_GR` in training."""
        ...

    @property
    def balanced_by_loss(self) -> bool:
        """True if nothing but the balance loss spreads the load over the experts."""
        ...

    def param_specs(self, width: int, num_experts: int) -> dict[str, ParamSpec]:
        """The parameters that one layer needs.

        Args:
          width: D, of the tokens.
          num_experts: E, routed experts.

        Returns:
          Name -> ParamSpec; empty: none.
        """
        ...

    def state_specs(self, num_experts: int) -> dict[str, StateSpec]:
        """The state, besides parameters, that one layer carries from step to step.

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
        """Choose experts for every token, also for padding (dispatch ignores those).

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
        """The state after a step.

        Args:
          state: arrays by the names of `state_specs`, with a leading axis of L layers.
          load_LE: sampled assignments per expert in the global batch (all microbatches and
            devices).

        Returns:
          The new state, of the same shapes.
        """
        ...


@runtime_checkable
class Dispatch(Protocol):
    """A frozen dataclass of a dispatch path's knobs; it owns no parameters.

    The planner, the held-out evaluation and the start-up log ask a path for its properties; they
    never compare its name.

    Dispatch and combine are one call because the combine weights are applied between them: the
    experts multiply each row by its weight before their second matmul (`weighs_hidden`), so the
    backward pass does not need the experts' outputs.
    """

    @property
    def drop_cause(self) -> str:
        """The field of Outcomes that counts the assignments it drops."""
        ...

    @property
    def drops(self) -> bool:
        """True if a sampled assignment of a real token can be dropped."""
        ...

    @property
    def grouped(self) -> bool:
        """True if experts multiply rows sorted by expert, not slots (`ExpertFunctions.grouped`)."""
        ...

    @property
    def weighs_hidden(self) -> bool:
        """True if the experts apply the rows' weights before their second matmul.

        If False, the combine applies them, and the backward pass needs the experts' outputs.
        """
        ...

    def lookahead(self, sizes: LayerSizes) -> str:
        """The knob that lets a later token evict an earlier one.

        Args:
          sizes: of one layer in a microbatch.

        Returns:
          Its name and value, such as `priority choice`; empty: no later token can.
        """
        ...

    def buffer_rows(self, sizes: LayerSizes) -> int:
        """The rows in one device's expert input buffer in training.

        Args:
          sizes: of one layer in a microbatch.

        Returns:
          The number of rows of width D.
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
        """The capacity: slots per expert per routing group.

        Args:
          tokens: S, tokens per group.
          choices: K, assignments per token.
          num_experts: E, of all shards.
          train: True: with the capacity factor of training; False: with that of evaluation.

        Returns:
          C; None: the path has no capacity.
        """
        ...

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: ExpertFunctions, inputs: DispatchIn
    ) -> tuple[jax.Array, jax.Array]:
        """Dispatch tokens to their experts, run the experts, and combine their outputs.

        Args:
          x_GSD: tokens of width D.
          choice: experts and weights of each token (K = E if experts choose tokens).
          experts: weights of the experts that this device holds, or of all experts.
          inputs: mask, mesh and mode.

        Returns:
          y_GSD, the sum over a token's kept assignments of weight * expert(x); and kept_GSK, True
          for kept assignments.
        """
        ...


@dataclasses.dataclass(frozen=True)
class MoEContext:
    """The inputs shared by all MoE layers of a forward pass: a pytree, `meta_fields` static."""

    token_ids_BT: Int[Array, "B T"]  # smaller than the vocabulary size
    mask_BT: Bool[Array, "B T"]  # True for real tokens, False for padding
    row_keys_B: jax.Array  # a typed PRNG key per row; a model folds in each layer's number
    mesh: Mesh | AbstractMesh | None  # axes of parallel/mesh.py; None: XLA splits the layer
    train: bool  # True: capacity, noise and dropout of training; False: of evaluation
    group_rows: int = 0  # rows per routing group; 0: as in the layer's config
    # Name -> [MoE layers, ...]; in a single layer without that axis.  Empty: the router keeps none.
    router_state: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    sources_BT: Int[Array, "B T"] | None = None  # data source, below num_sources; None: all 0
    num_sources: int = 1  # number of data sources, for the ledger


jax.tree_util.register_dataclass(
    MoEContext,
    data_fields=["token_ids_BT", "mask_BT", "row_keys_B", "router_state", "sources_BT"],
    meta_fields=["mesh", "group_rows", "train", "num_sources"],
)
