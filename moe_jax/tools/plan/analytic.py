"""Estimates the peak memory of one device from first principles.

N tokens of one device in a microbatch, M rows of a dispatch buffer, D width, F expert width, U
matrices into an expert, E experts, K experts per token, L layers, H query and J key/value heads, A
head width, V vocabulary.  All sizes are per device.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.model.config import ModelConfig
from moe_jax.moe.dispatch_types import Exchange
from moe_jax.moe.types import Dispatch
from moe_jax.ops.expert_activation import ACTIVATE
from moe_jax.parallel.rules import on_mesh, spec
from moe_jax.run.resolve import layer_sizes
from moe_jax.tools.plan.lowering import Leaf, Plan, split_ways


class Memory(NamedTuple):
    """The bytes of one device at the peak of a step, by purpose."""

    parameters: float  # with their compute-dtype copies
    optimizer: float
    gradients: float
    activations: float
    dispatch: float
    collectives: float  # gathered weights of a layer, and receive buffers of all-to-alls

    @property
    def total(self) -> float:
        """The sum of all purposes."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class DeviceSizes:
    """The sizes of one device's share of the model and of a microbatch."""

    model: ModelConfig
    sizes: dict[str, int]  # mesh axis -> its size
    c: float  # bytes per element in the compute dtype
    N: int
    M: int  # 0 without experts
    U: int
    dispatch: Dispatch | None  # None without experts
    exchange: Exchange | None  # of tokens between expert shards

    @property
    def vocab(self) -> int:
        """The columns of the output head."""
        return self.model.vocab_size // self.sizes["tensor"]

    @property
    def ffn(self) -> int:
        """The columns of the experts' hidden layer."""
        return self.model.moe.expert_width // self.sizes["tensor"]

    @property
    def dense_ffn(self) -> int:
        """The columns of a dense hidden layer."""
        return self.model.ffn_width // self.sizes["tensor"]

    @property
    def heads(self) -> tuple[int, int]:
        """The number of query heads and of key/value heads."""
        tensor = self.sizes["tensor"]
        return self.model.num_heads // tensor, self.model.num_kv_heads // tensor


def local_sizes(plan: Plan) -> DeviceSizes:
    """Compute the sizes of one device's share."""
    config, model = plan.config, plan.config.model
    sizes = dataclasses.asdict(config.mesh)
    rows = config.train.batch_size // config.train.accumulation // config.mesh.batch_shards
    N, M, exchange, parts = rows * config.data.sequence_length, 0, None, plan.model.components
    if parts is not None:
        layer = layer_sizes(config)
        M, exchange = parts.dispatch.buffer_rows(layer), parts.dispatch.exchange(layer)
    U = ACTIVATE[model.activation][0]
    c = float(jnp.dtype(config.precision).itemsize)
    return DeviceSizes(model, sizes, c, N, M, U, parts and parts.dispatch, exchange)


def estimate(plan: Plan) -> Memory:
    """Estimate the peak of a step: at the loss, or in the backward pass of a layer.

    Scanned layers write their gradients into stacked arrays, which exist during the whole backward
    pass.  Unrolled layers make their gradients one by one, in the compute dtype, and free their
    saved activations on the way.
    """
    parameters, copies, optimizer = state_bytes(plan)
    local = local_sizes(plan)
    model, c = local.model, local.c
    # With several microbatches, memory has the summed gradients and those of one microbatch.
    summed = parameters if plan.config.train.accumulation > 1 else 0.0
    saved, layer = saved_bytes(plan, local), layer_bytes(local)
    # From the loss on, memory has the whole head and its whole gradient (ops/cross_entropy.py).
    head = local.vocab * model.width
    logits = min(model.loss_chunk, local.N) * local.vocab * (4 + c)
    gathered = gathered_bytes(plan, local)
    fixed = all_to_alls(plan, local) * local.M * model.width * c

    def moment(gradients, activations, dispatch=0.0, collectives=0.0):
        gradients += summed + head * 4
        collectives += fixed
        return Memory(parameters + copies, optimizer, gradients, activations, dispatch, collectives)

    moments = [moment(0.0, saved + logits, collectives=head * c)]
    if plan.model.layout.repeats:
        back = saved + layer.activations
        moments.append(moment(_gradient_bytes(plan), back, layer.dispatch, 2 * gathered))
    else:
        one = saved / model.num_layers
        made = parameters * c / 4
        for activations, gradients in ((saved, 0.0), (one, made)):
            back = activations + layer.activations
            moments.append(moment(gradients, back, layer.dispatch, 2 * gathered))
    return max(moments, key=lambda memory: memory.total)


def state_bytes(plan: Plan) -> tuple[float, float, float]:
    """The exact bytes of parameters, of their compute-dtype copies, and of optimizer state."""
    parameters = copies = optimizer = 0.0
    for leaf in plan.leaves:
        ways = split_ways(leaf.axes, plan.mesh.shape)
        parameters += leaf.bytes / ways
        copies += leaf.copy / ways
        optimizer += leaf.beside / ways + leaf.by_matrix / _matrix_ways(leaf, plan) + leaf.whole
    return parameters, copies, optimizer


def _matrix_ways(leaf: Leaf, plan: Plan) -> int:
    """The number of parts into which the mesh splits optimizer state kept per matrix."""
    axes = on_mesh(leaf.axes, leaf.shape, plan.mesh.shape)
    return split_ways([axes[axis] for axis in leaf.leading], plan.mesh.shape)


def _gradient_bytes(plan: Plan) -> float:
    """The gradient bytes of one microbatch; with a copy, a gradient has the copy's dtype."""
    return sum(
        (leaf.copy or leaf.bytes) / split_ways(leaf.axes, plan.mesh.shape) for leaf in plan.leaves
    )


def moe_layers(model: ModelConfig) -> int:
    """The number of MoE layers."""
    return sum(model.is_moe(layer) for layer in range(model.num_layers))


def saved_bytes(plan: Plan, local: DeviceSizes) -> float:
    """The bytes that all layers save in the forward pass for the backward pass."""
    model, c, N, M, U = local.model, local.c, local.N, local.M, local.U
    D, A = model.width, model.head_dim
    H, J = local.heads
    layers, sparse = model.num_layers, moe_layers(model)
    stream = layers * N * D * c  # the input of each block
    projections = layers * N * (H + 2 * J) * A * c
    attention = layers * N * H * A * c
    dense = (layers - sparse) * N * local.dense_ffn * c
    wide = sparse * M * local.ffn * c
    # The routers' logits, and the dispatched tokens with their combine weights.
    dispatched = sparse * (N * model.moe.num_experts * 4 + M * (D * c + 4))
    if local.dispatch is not None and not local.dispatch.weighs_hidden:
        dispatched += sparse * M * D * c  # the experts' outputs
    if model.remat == "save_dispatch":
        return stream + dispatched
    if model.remat == "save_hidden":
        return stream + dispatched + attention + U * (dense + wide)
    if model.remat == "dots":
        return 2 * stream + projections + U * dense
    if model.remat != "none":
        return stream
    kept = 4 * stream + projections + attention + layers * N * H * 4 + dispatched
    if not plan.model.layout.repeats:
        return stream + kept + (U + 1) * (dense + wide)
    # A scan saves every operand of every backward rule: float32 inside the norms, each factor of
    # the activation, and the layer's gathered weights in the compute dtype.
    weights = layers * gathered_bytes(plan, local)
    return stream + kept + 3 * layers * N * D * 4 + (2 * U + 2) * (dense + wide) + weights


class Working(NamedTuple):
    """The bytes of one layer's backward pass, beside what was saved."""

    activations: float
    dispatch: float


def layer_bytes(local: DeviceSizes) -> Working:
    """Estimate the peak of one layer's backward pass, beside what was saved."""
    model, c, N, M, U = local.model, local.c, local.N, local.M, local.U
    stream = 4 * N * model.width * c
    if not moe_layers(model):
        return Working(stream + N * local.dense_ffn * c * 2 * (U + 1), 0.0)
    wide, narrow = M * local.ffn * c, M * model.width * c
    if model.remat == "none":  # nothing is recomputed: only the gradients
        return Working(stream, (U + 1) * wide + 2 * narrow)
    if local.dispatch is not None and local.dispatch.grouped:
        # The peak is the larger of two moments: the activation's backward pass (its inputs, their
        # gradients, and intermediates), or the recomputed hidden layer together with the tokens
        # sent, received and sorted for dispatch and combine.
        here = model.moe.num_experts // local.sizes["expert"]
        mask = M * here * 128 if here > 1 else 0  # of ragged_dot, one byte per lane
        return Working(
            stream, max((2 * U + 3) * wide + 4 * narrow, (U + 2) * wide + 5 * narrow + mask)
        )
    # A batched matmul computes the activation when it reads its operand, and the activation's
    # gradient when it writes its result.
    return Working(stream, 2 * U * wide + 3 * narrow)


def passes_to_experts(local: DeviceSizes) -> tuple[int, int]:
    """Count the exchanges of one MoE layer per step: (dispatches, combines).

    Each happens once forward and once backward, and once more if remat repeats it.  If the combine
    weighs the experts' outputs, the backward pass needs them, and no remat policy saves them by
    name: both are repeated.  Else only the dispatch is, under policies that do not save its tokens.
    """
    assert local.dispatch is not None
    if not local.dispatch.weighs_hidden:
        times = 2 + (local.model.remat != "none")
        return times, times
    return 2 + (local.model.remat in ("full", "dots")), 2


def all_to_alls(plan: Plan, local: DeviceSizes) -> int:
    """Count the all-to-alls in the program, where a scan's body appears once.

    Each has its own receive buffer (see compiled.py).
    """
    model, layout = plan.config.model, plan.model.layout
    if local.exchange is None or local.exchange.dispatch != "all-to-all":
        return 0
    layers = [*layout.unrolled(), *range(layout.prefix, layout.prefix + layout.period)]
    present = layers if layout.repeats else range(model.num_layers)
    return sum(passes_to_experts(local)) * sum(model.is_moe(layer) for layer in present)


def gathered_bytes(plan: Plan, local: DeviceSizes) -> float:
    """The bytes of one layer's weights in the compute dtype, gathered over fsdp."""
    sizes = plan.mesh.shape
    if sizes["fsdp"] == 1 and plan.config.model.remat != "none":
        return 0.0
    total = 0.0
    for leaf in plan.leaves:
        if "fsdp" in str(spec(leaf.axes)) and leaf.name not in ("embed_VD", "head_DV"):
            total += leaf.size * local.c / split_ways(leaf.axes, sizes, ("expert", "tensor"))
    return total / local.model.num_layers
