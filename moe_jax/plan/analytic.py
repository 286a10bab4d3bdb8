"""Bytes a device holds at its fullest, from first principles.

Axes as everywhere: N tokens of one device in a microbatch, M rows in a dispatch buffer, D width, F
expert width, U matrices into an expert, E experts, K choices, L layers, H and J heads, A head
width, V vocabulary.  All sizes here are those of one device.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.model.config import ModelConfig
from moe_jax.model.moe.experts import ACTIVATE
from moe_jax.model.moe.layer import make_dispatch
from moe_jax.parallel.rules import spec
from moe_jax.plan.lowering import Plan, split_ways


class Memory(NamedTuple):
    """Bytes a device holds at the fullest moment of a step, by what they are for."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    dispatch: float
    collectives: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Local:
    """Sizes of one device's share of the model and of a microbatch."""

    model: ModelConfig
    sizes: dict[str, int]  # of the mesh axes
    c: int  # bytes of a computed number
    N: int
    M: int  # 0 without experts
    U: int

    @property
    def vocab(self) -> int:
        """Columns of the head."""
        return self.model.vocab_size // self.sizes["tensor"]

    @property
    def ffn(self) -> int:
        """Columns of the experts' hidden layer."""
        return self.model.moe.expert_width // self.sizes["tensor"]

    @property
    def dense_ffn(self) -> int:
        """Columns of a dense hidden layer."""
        return self.model.ffn_width // self.sizes["tensor"]

    @property
    def heads(self) -> tuple[int, int]:
        """Query and key/value heads."""
        tensor = self.sizes["tensor"]
        return self.model.num_heads // tensor, self.model.num_kv_heads // tensor


def local_sizes(plan: Plan) -> Local:
    """Sizes of one device's share."""
    config, model = plan.config, plan.config.model
    sizes = dataclasses.asdict(config.mesh)
    rows = config.train.batch_size // config.train.accumulation // config.mesh.batch_shards
    N = rows * config.data.sequence_length
    M = 0 if model.dense else buffer_rows(plan, rows)
    U = ACTIVATE[model.activation][0]
    return Local(model, sizes, jnp.dtype(config.precision).itemsize, N, M, U)


def buffer_rows(plan: Plan, rows: int) -> int:
    """Rows of the buffer in which a device's experts find their tokens."""
    config, moe = plan.config, plan.config.model.moe
    dispatch = make_dispatch(moe)
    T, K, E = config.data.sequence_length, moe.top_k, moe.num_experts
    if moe.dispatch == "dense":
        return rows * T * E
    capacity = dispatch.capacity(moe.group_rows * T, K, E, True)
    if capacity is not None:
        return rows // moe.group_rows * E * capacity
    shards = config.mesh.expert
    assignments = rows * T * K
    factor = min(getattr(dispatch, "recv_factor", 0) or shards, shards)
    return shards * min(assignments, math.ceil(assignments * factor / shards))


def estimate(plan: Plan) -> Memory:
    """The fullest moment of the step: at the loss, or while a layer goes back."""
    parameters, optimizer = state_bytes(plan)
    local = local_sizes(plan)
    again = plan.config.train.accumulation > 1
    # With several microbatches there are the sum of the gradients and those of one.
    summed = parameters if again else 0.0
    saved, V = saved_bytes(local), local.vocab
    D, c = local.model.width, local.c
    # The head's gradient is there whole from the loss on (ops/cross_entropy.py), the head with it.
    head = V * D * 4
    chunk = min(local.model.loss_chunk, local.N)
    at_loss = Memory(
        parameters, optimizer, summed + head, saved + chunk * V * (4 + c), 0.0, V * D * c
    )
    layer = layer_bytes(local)
    at_layer = Memory(
        parameters,
        optimizer,
        summed + parameters + head,
        saved + layer.activations,
        layer.dispatch,
        gathered_bytes(plan),
    )
    return max(at_loss, at_layer, key=lambda memory: memory.total)


def state_bytes(plan: Plan) -> tuple[float, float]:
    """Parameters and optimizer state, exact."""
    parameters = optimizer = 0.0
    for leaf in plan.leaves:
        ways = split_ways(leaf.axes, plan.mesh.shape)
        parameters += leaf.bytes / ways
        optimizer += leaf.beside / ways + leaf.whole
    return parameters, optimizer


def moe_layers(model: ModelConfig) -> int:
    """Layers that hold experts."""
    return sum(model.is_moe(layer) for layer in range(model.num_layers))


def saved_bytes(local: Local) -> float:
    """What all layers keep of the forward pass for the backward pass."""
    model, c, N, M = local.model, local.c, local.N, local.M
    D, A, E = model.width, model.head_dim, model.moe.num_experts
    H, J = local.heads
    sparse = moe_layers(model)
    stream = N * D * c
    total = model.num_layers * stream  # where each block begins
    routing = sparse * N * E * 4
    attention = model.num_layers * N * H * A * c
    hidden = (model.num_layers - sparse) * N * local.U * local.dense_ffn * c
    hidden += sparse * M * local.U * local.ffn * c
    dispatched = sparse * 2 * M * D * c
    if model.remat == "save_dispatch":
        total += routing + dispatched
    if model.remat == "save_hidden":
        total += routing + dispatched + attention + hidden
    if model.remat == "dots":
        projections = model.num_layers * N * ((H + 2 * J) * A + D) * c
        total += projections + hidden - sparse * M * local.U * local.ffn * c
    if model.remat == "none":
        per_layer = N * (2 * D * c + 2 * D * c + (H + 2 * J) * A * c + H * 4)
        active = (model.num_layers - sparse) * N * local.dense_ffn + sparse * M * local.ffn
        total += model.num_layers * per_layer + attention + hidden + active * c + dispatched
        total += routing
    return total


class Working(NamedTuple):
    """What one layer holds while it goes back."""

    activations: float
    dispatch: float


def layer_bytes(local: Local) -> Working:
    """The fullest moment of one layer's backward pass."""
    model, c, N, M, U = local.model, local.c, local.N, local.M, local.U
    stream = 4 * N * model.width * c
    if not moe_layers(model):
        return Working(stream + N * local.dense_ffn * c * 2 * (U + 1), 0.0)
    wide, narrow = M * local.ffn * c, M * model.width * c
    if model.moe.dispatch == "dropless":
        # Before the activation and its gradient, and what lies between them; or the hidden layer
        # forward again, with tokens sent, received and sorted, there and back.
        here = model.moe.num_experts // local.sizes["expert"]
        mask = M * here * 128 if here > 1 else 0  # ragged_dot's, a byte a lane
        return Working(
            stream, max((2 * U + 3) * wide + 2 * narrow, (U + 2) * wide + 5 * narrow + mask)
        )
    return Working(stream, (2 * U + 2) * wide + 3 * narrow)


def gathered_bytes(plan: Plan) -> float:
    """One layer's weights without their fsdp split, and their gradients before theirs."""
    sizes = plan.mesh.shape
    if sizes["fsdp"] == 1:
        return 0.0
    c, layers = local_sizes(plan).c, plan.config.model.num_layers
    total = 0.0
    for leaf in plan.leaves:
        if "fsdp" in str(spec(leaf.axes)) and leaf.name not in ("embed_VD", "head_DV"):
            total += leaf.size * c / split_ways(leaf.axes, sizes, ("expert", "tensor"))
    return 2 * total / layers
