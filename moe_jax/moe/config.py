"""Config of a mixture-of-experts layer: the knobs that all routers and dispatch paths share."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from moe_jax import bounds
from moe_jax.bounds import Limit, Rule, above, at_least, one_of, within
from moe_jax.decides import Data, Run, Training, Weights
from moe_jax.errors import UserError

PRIORITIES = ("token", "choice", "batch")
MAX_CAPACITY = 1e6  # far beyond any number of experts, and far from overflowing
CAPACITY = Limit(
    f"above 0 and at most {MAX_CAPACITY:g}; at num_experts nothing is dropped",
    lambda factor: 0 < factor <= MAX_CAPACITY,
    "set it",
)
BALANCE_SCOPES = ("group", "row", "global")
BALANCE_LAYERS = ("mean", "sum", "pooled")
MATMULS = ("compute", "float8")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The router, dispatch path, number of experts and weights of the auxiliary losses.

    Raises:
      UserError: a value out of range.

    Reference: Shazeer et al., arXiv 1701.06538; GShard, arXiv 2006.16668; Switch, arXiv 2101.03961.
    """

    num_experts: Weights[Annotated[int, at_least(1)]] = 8  # E, routed experts per MoE layer
    # K, experts per token; routers with a fixed K (switch 1, gshard 2, soft E) ignore it.
    top_k: Weights[Annotated[int, Rule("between 1 and num_experts")]] = 2
    expert_width: Weights[Annotated[int, at_least(1)]] = 1024  # F, hidden width of one expert
    router: Weights[str] = "top_k"  # which router chooses the experts of a token
    dispatch: Training[str] = "capacity"  # how tokens are moved to their experts
    # Slots per expert per routing group, in multiples of a balanced load (S * K / E assignments).
    capacity_factor: Training[Annotated[float, CAPACITY]] = 1.25
    eval_capacity_factor: Run[Annotated[float, CAPACITY]] = 2.0  # the same in evaluation
    # Which assignments get slots first: token (causal) | choice (GShard, Switch) | batch (V-MoE,
    # never causal).
    priority: Training[Annotated[str, one_of(PRIORITIES)]] = "token"
    # Rows per routing group; 0: derived from the batch and the mesh.
    group_rows: Data[Annotated[int, at_least(0)]] = 0
    every: Weights[Annotated[int, at_least(1)]] = (
        1  # MoE in every n-th layer (the n-th, 2n-th, ...)
    )
    # Number of first layers that stay dense, whatever `every` is; 0: none.
    first_dense: Weights[Annotated[int, at_least(0)]] = 0
    # Always-on experts of expert_width, beside the routed ones; 0: none.
    shared_experts: Weights[Annotated[int, at_least(0)]] = 0
    # Weight of the balance loss; 0: off.
    balance_weight: Training[Annotated[float, at_least(0)]] = 0.01
    # Tokens over which the load is balanced: group | row | global (a microbatch).
    balance_scope: Training[Annotated[str, one_of(BALANCE_SCOPES)]] = "group"
    # The balance loss of all MoE layers: mean (of theirs: t5x, MegaBlocks) | sum (of theirs:
    # Switch, Megatron-LM, DeepSeek) | pooled (one loss, of the load and probabilities averaged over
    # layers and each microbatch: Hugging Face, whose coefficient c is balance_weight = K c).
    balance_layers: Training[Annotated[str, one_of(BALANCE_LAYERS)]] = "mean"
    # Weight of the router z-loss (ST-MoE, arXiv 2202.08906); 0: off.
    z_weight: Training[Annotated[float, at_least(0)]] = 0.001
    # Factor on the initial standard deviation of the experts' matrices; Switch: 0.316, sqrt(0.1).
    expert_init_scale: Training[Annotated[float, above(0)]] = 1.0
    # Dropout of the routed experts' output in training; 0: none.  Switch (arXiv 2101.03961) applies
    # it inside the experts; that would require sending a mask or keys to the experts with the
    # tokens.
    expert_dropout: Training[Annotated[float, within("[0, 1)")]] = 0.0
    # Precision of the experts' matmuls: compute (the model's dtype) | float8 (dispatch dropless;
    # ops/float8.py).
    matmul: Training[Annotated[str, one_of(MATMULS)]] = "compute"
    freeze_router: Training[bool] = False  # do not train the router's parameters and state
    # Name of a router or dispatch path -> the knobs that only it has.
    options: Training[Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        bounds.check(self, "model.moe.")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"model.moe.top_k is {self.top_k} with {self.num_experts} experts: "
                f"set top_k between 1 and num_experts."
            )
        for name, knobs in self.options.items():
            if not isinstance(knobs, Mapping):
                raise UserError(
                    f"model.moe.options.{name} is {knobs!r}: it must be a table of knobs. "
                    f"Set model.moe.options.{name}.KNOB."
                )
