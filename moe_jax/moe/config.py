"""Knobs of a mixture-of-experts layer that every router and dispatch path shares."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.decides import Data, Run, Training, Weights
from moe_jax.errors import UserError

PRIORITIES = ("token", "choice", "batch")
MOST_CAPACITY = 1e6  # far beyond any number of experts, and far from overflowing
BALANCE_SCOPES = ("group", "row", "global")
MATMULS = ("compute", "float8")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Which router and dispatch path, how many experts, and what the auxiliary losses weigh.

    Raises:
      UserError: a value out of range.

    Reference: Shazeer et al., arXiv 1701.06538; GShard, arXiv 2006.16668; Switch, arXiv 2101.03961.
    """

    num_experts: Weights[int] = 8  # E, routed experts per MoE layer
    top_k: Weights[int] = 2  # K; routers with a fixed K (switch, gshard) override it
    expert_width: Weights[int] = 1024  # F, hidden width of one expert
    router: Weights[str] = "top_k"  # a key of ROUTERS
    dispatch: Training[str] = "capacity"  # a key of DISPATCH
    # Slots of an expert in a routing group, in multiples of an even load of S * K / E assignments.
    capacity_factor: Training[float] = 1.25
    eval_capacity_factor: Run[float] = 2.0  # the same in evaluation
    # Who gets a slot first: token (causal) | choice (GShard, Switch) | batch (V-MoE, never causal).
    priority: Training[str] = "token"
    group_rows: Data[int] = 0  # rows in a routing group; 0: resolved from batch and mesh limits
    every: Weights[int] = 1  # MoE in every n-th layer (the n-th, 2n-th, ...)
    first_dense: Weights[int] = 0  # the first layers stay dense whatever `every` says; 0: none
    shared_experts: Weights[int] = 0  # always-on, of expert_width, beside the routed ones; 0: none
    balance_weight: Training[float] = 0.01  # of the balance loss; 0: off
    balance_scope: Training[str] = "group"  # over which tokens it balances: group | row | global
    z_weight: Training[float] = 0.001  # of the router z-loss (ST-MoE, arXiv 2202.08906); 0: off
    # Of the routed experts' output, in training; 0: none.  Switch (arXiv 2101.03961) drops inside
    # the experts; at their output the mask need not travel with the tokens.
    expert_dropout: Training[float] = 0.0
    # Of the experts: compute (the model's dtype) | float8 (dispatch dropless; ops/float8.py).
    matmul: Training[str] = "compute"
    freeze_router: Training[bool] = False  # the router's parameters and state stay as they are
    # Name of a router or dispatch path -> the knobs that belong to it alone.  config.py fills it
    # from their dataclasses, so a new one needs no change here.
    options: Training[Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.num_experts < 1:
            raise UserError(f"model.moe.num_experts is {self.num_experts}: set 1 or more.")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"model.moe.top_k is {self.top_k} with {self.num_experts} experts: "
                f"set top_k between 1 and num_experts."
            )
        for name in ("capacity_factor", "eval_capacity_factor"):
            if not 0 < getattr(self, name) <= MOST_CAPACITY:
                raise UserError(
                    f"model.moe.{name} is {getattr(self, name)}: set it above 0 and at most "
                    f"{MOST_CAPACITY:g}; num_experts ({self.num_experts}) already drops nothing."
                )
        for name in ("expert_width", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"model.moe.{name} is {getattr(self, name)}: set 1 or more.")
        for name in ("group_rows", "first_dense", "shared_experts", "balance_weight", "z_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"model.moe.{name} is {getattr(self, name)}: set 0 or more.")
        for name, knobs in self.options.items():
            if not isinstance(knobs, Mapping):
                raise UserError(f"model.moe.options.{name} is {knobs!r}: it holds keys of its own.")
        if not 0 <= self.expert_dropout < 1:
            raise UserError(f"model.moe.expert_dropout is {self.expert_dropout}: set it in [0, 1).")
        lists = {"priority": PRIORITIES, "balance_scope": BALANCE_SCOPES, "matmul": MATMULS}
        for name, known in lists.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"model.moe.{name} is {getattr(self, name)!r}: use one of {', '.join(known)}."
                )
