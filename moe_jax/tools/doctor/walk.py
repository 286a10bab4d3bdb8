"""Runs the blocks of the initial model one after another, so that a check can measure each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.block import Block
from moe_jax.model.forward import batch_context
from moe_jax.model.layout import to_layers
from moe_jax.model.rope import rope_tables
from moe_jax.moe.types import MoEContext
from moe_jax.tools.doctor.subject import Subject
from moe_jax.train.step import step_keys

# (block, its context, a function that runs it) -> (the stream after the block, figures)
Measure = Callable[[Block, MoEContext, Callable[[], jax.Array]], tuple[jax.Array, Any]]


def walk_blocks(subject: Subject, measure: Measure, train: bool) -> list[Any]:
    """Run every block on the first microbatch and measure it; each kind of block compiles once.

    Args:
      subject: before its first step.
      measure: called under jit.
      train: True: capacity, noise and dropout are those of training.

    Returns:
      The figures of each layer, as NumPy arrays.
    """
    run, state = subject.run, subject.state()
    model, config = run.model, run.model.config
    batch = jax.tree.map(lambda leaf: leaf[0], subject.batch)
    keys_B = step_keys(run.config.seed, jnp.int32(0), batch.row_B)
    context = batch_context(batch, keys_B, run.mesh, train, {}, run.step_options.num_sources)
    rope = rope_tables(batch.positions_BT, config.head_dim, config.rope_theta, model.dtype)
    segments = batch.segments_BT if config.confine_attention else None

    def block_of(layer: int) -> Any:
        def measured(params: Any, router: Any, x: jax.Array):
            here = dataclasses.replace(context, router_state=router)
            block = nnx.merge(model.blocks[layer], params)
            return measure(block, here, lambda: block(x, rope, segments, here)[0])

        return jax.jit(measured)

    compiled: dict[bool, Any] = {}
    x = state.params["embed_VD"].astype(model.dtype)[batch.tokens_BT]
    blocks, found, moe_layer = to_layers(state.params, model.layout)["blocks"], [], 0
    for layer in range(config.num_layers):
        is_moe = config.is_moe(layer)
        if is_moe not in compiled:
            compiled[is_moe] = block_of(layer)
        router = {k: v[moe_layer] for k, v in state.router.items()} if is_moe else {}
        moe_layer += is_moe
        x, figures = compiled[is_moe](blocks[str(layer)], router, x)
        found.append(jax.device_get(figures))
    return found
