"""Bytes a device holds at its fullest, from first principles.

Axes as everywhere: N tokens of one device in a microbatch, M rows in a dispatch buffer, D width, F
expert width, U matrices into an expert, E experts, K choices, L layers, H and J heads, A head
width, V vocabulary.  All sizes here are those of one device.
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
    """Bytes a device holds at the fullest moment of a step, by what they are for."""

    parameters: float  # and their copies in the compute dtype
    optimizer: float
    gradients: float
    activations: float
    dispatch: float
    collectives: float  # weights as the layer sees them, and what all-to-alls write into

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Local:
    """Sizes of one device's share of the model and of a microbatch."""

    model: ModelConfig
    sizes: dict[str, int]  # of the mesh axes
    c: float  # bytes of a computed number
    N: int
    M: int  # 0 without experts
    U: int
    dispatch: Dispatch | None  # None without experts
    exchange: Exchange | None  # of tokens between expert shards

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
    N, M, exchange, parts = rows * config.data.sequence_length, 0, None, plan.model.components
    if parts is not None:
        layer = layer_sizes(config)
        M, exchange = parts.dispatch.buffer_rows(layer), parts.dispatch.exchange(layer)
    U = ACTIVATE[model.activation][0]
    c = float(jnp.dtype(config.precision).itemsize)
    return Local(model, sizes, c, N, M, U, parts and parts.dispatch, exchange)


def estimate(plan: Plan) -> Memory:
    """The fullest moment of the step: at the loss, or while a layer goes back.

    Scanned layers write their gradients into stacks that exist from the first layer that goes back
    to the last; unrolled ones make them one by one, in the compute dtype, while what was saved
    for them is given up.
    """
    parameters, copies, optimizer = state_bytes(plan)
    local = local_sizes(plan)
    model, c = local.model, local.c
    # With several microbatches there are the sum of the gradients and those of one.
    summed = parameters if plan.config.train.accumulation > 1 else 0.0
    saved, layer = saved_bytes(plan, local), layer_bytes(local)
    # The head's gradient is there whole from the loss on (ops/cross_entropy.py), the head with it.
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
    """Parameters, their copies in the compute dtype and optimizer state, exact."""
    parameters = copies = optimizer = 0.0
    for leaf in plan.leaves:
        ways = split_ways(leaf.axes, plan.mesh.shape)
        parameters += leaf.bytes / ways
        copies += leaf.copy / ways
        optimizer += leaf.beside / ways + leaf.by_matrix / _matrix_ways(leaf, plan) + leaf.whole
    return parameters, copies, optimizer


def _matrix_ways(leaf: Leaf, plan: Plan) -> int:
    """Into how many parts the mesh splits what is kept of each matrix."""
    axes = on_mesh(leaf.axes, leaf.shape, plan.mesh.shape)
    return split_ways([axes[axis] for axis in leaf.leading], plan.mesh.shape)


def _gradient_bytes(plan: Plan) -> float:
    """Of one microbatch: a parameter with a copy has its gradient in the copy's dtype."""
    return sum(
        (leaf.copy or leaf.bytes) / split_ways(leaf.axes, plan.mesh.shape) for leaf in plan.leaves
    )


def moe_layers(model: ModelConfig) -> int:
    """Layers that hold experts."""
    return sum(model.is_moe(layer) for layer in range(model.num_layers))


def saved_bytes(plan: Plan, local: Local) -> float:
    """What all layers keep of the forward pass for the backward pass."""
    model, c, N, M, U = local.model, local.c, local.N, local.M, local.U
    D, A = model.width, model.head_dim
    H, J = local.heads
    layers, sparse = model.num_layers, moe_layers(model)
    stream = layers * N * D * c  # where each block begins
    projections = layers * N * (H + 2 * J) * A * c
    attention = layers * N * H * A * c
    dense = (layers - sparse) * N * local.dense_ffn * c
    wide = sparse * M * local.ffn * c
    # The routers' logits, and tokens and their weights where their experts are.
    dispatched = sparse * (N * model.moe.num_experts * 4 + M * (D * c + 4))
    if local.dispatch is not None and not local.dispatch.weighs_hidden:
        dispatched += sparse * M * D * c  # and back
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
    # A scan keeps every operand of every derivative: float32 inside the norms, each factor of the
    # activation, and the weights in the compute dtype as the layer saw them.
    weights = layers * gathered_bytes(plan, local)
    return stream + kept + 3 * layers * N * D * 4 + (2 * U + 2) * (dense + wide) + weights


class Working(NamedTuple):
    """What one layer holds while it goes back."""

    activations: float
    dispatch: float


def layer_bytes(local: Local) -> Working:
    """The fullest moment of one layer's backward pass, beside what was saved."""
    model, c, N, M, U = local.model, local.c, local.N, local.M, local.U
    stream = 4 * N * model.width * c
    if not moe_layers(model):
        return Working(stream + N * local.dense_ffn * c * 2 * (U + 1), 0.0)
    wide, narrow = M * local.ffn * c, M * model.width * c
    if model.remat == "none":  # nothing is computed again: gradients alone
        return Working(stream, (U + 1) * wide + 2 * narrow)
    if local.dispatch is not None and local.dispatch.grouped:
        # Before the activation and its gradient, and what lies between them; or the hidden layer
        # forward again, with tokens sent, received and sorted, there and back.
        here = model.moe.num_experts // local.sizes["expert"]
        mask = M * here * 128 if here > 1 else 0  # ragged_dot's, a byte a lane
        return Working(
            stream, max((2 * U + 3) * wide + 4 * narrow, (U + 2) * wide + 5 * narrow + mask)
        )
    # A batched product computes the activation as it reads, and its gradient as it writes.
    return Working(stream, 2 * U * wide + 3 * narrow)


def passes_to_experts(local: Local) -> tuple[int, int]:
    """How often one MoE layer's tokens travel in a step: to their experts, and from them back.

    Forward and backward each once, and again what a remat policy forgets.  Where the combine weighs
    what experts made, that is in a derivative, and no policy knows its tensors by name: all of it
    travels again.  Elsewhere tokens alone do, under the policies that do not keep them.
    """
    assert local.dispatch is not None
    if not local.dispatch.weighs_hidden:
        times = 2 + (local.model.remat != "none")
        return times, times
    return 2 + (local.model.remat in ("full", "dots")), 2


def all_to_alls(plan: Plan, local: Local) -> int:
    """All-to-alls in the program; a scan's body stands there once.  Each has a buffer of its own
    in which it lands (see compiled.py)."""
    model, layout = plan.config.model, plan.model.layout
    if local.exchange is None or local.exchange.dispatch != "all-to-all":
        return 0
    layers = [*layout.unrolled(), *range(layout.prefix, layout.prefix + layout.period)]
    present = layers if layout.repeats else range(model.num_layers)
    return sum(passes_to_experts(local)) * sum(model.is_moe(layer) for layer in present)


def gathered_bytes(plan: Plan, local: Local) -> float:
    """One layer's weights in the compute dtype, without their fsdp split."""
    sizes = plan.mesh.shape
    if sizes["fsdp"] == 1 and plan.config.model.remat != "none":
        return 0.0
    total = 0.0
    for leaf in plan.leaves:
        if "fsdp" in str(spec(leaf.axes)) and leaf.name not in ("embed_VD", "head_DV"):
            total += leaf.size * local.c / split_ways(leaf.axes, sizes, ("expert", "tensor"))
    return total / local.model.num_layers
