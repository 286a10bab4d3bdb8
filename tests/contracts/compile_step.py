"""Compile the train step of a small model on eight devices: `compile_step.py DISPATCH data=2 ...`.

A process of its own, so that a test can read all that XLA logs about it.  The dispatch path
`all_at_once` is the control: XLA finds no way to reshard its backward.
"""

import sys

import jax
import jax.numpy as jnp

from moe_jax.data.pipeline import Batch
from moe_jax.model.config import ModelConfig
from moe_jax.model.moe.config import MoEConfig
from moe_jax.model.moe.dispatch import DISPATCH
from moe_jax.model.moe.dispatch.dense import Dense
from moe_jax.model.moe.dispatch.slots import count_stats
from moe_jax.model.stack import define
from moe_jax.optim import Optimizer, OptimizerConfig
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.rules import sharding
from moe_jax.train.state import abstract_state, state_shardings
from moe_jax.train.step import StepOptions, make_train_step

ROWS, T = 16, 32


class AllAtOnce(Dense):
    """`Dense` without its loop over the experts."""

    def __call__(self, x_GSD, choice, experts, inputs):
        G, S, D = x_GSD.shape
        E = experts.num_experts
        weights_GSE = jnp.einsum(
            "gsk,gske->gse", choice.weights_GSK, jax.nn.one_hot(choice.ids_GSK, E)
        )
        y_END = experts.batched(jnp.broadcast_to(x_GSD.reshape(1, G * S, D), (E, G * S, D)))
        y_ND = jnp.einsum("end,ne->nd", y_END, weights_GSE.reshape(G * S, E))
        kept_GSK = choice.valid_GSK & inputs.mask_GS[..., None]
        return y_ND.reshape(G, S, D), count_stats(choice, inputs.mask_GS, kept_GSK)


DISPATCH["all_at_once"] = AllAtOnce


def main(dispatch: str, sizes: dict[str, int]) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    moe = MoEConfig(num_experts=8, expert_width=64, dispatch=dispatch, group_rows=2)
    model = define(
        ModelConfig(vocab_size=256, num_layers=2, width=64, head_dim=16, moe=moe), jnp.float32
    )
    optimizer = Optimizer(OptimizerConfig(), 10)
    step = make_train_step(model, optimizer, StepOptions(0, 2, 1.0), mesh)
    where = state_shardings(model, optimizer, mesh)

    def array(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes))

    tokens = array((1, ROWS, T), jnp.int32, (None, "batch", None))
    batch = Batch(*[tokens] * 7, array((1, ROWS), jnp.int32, (None, "batch")))
    batch = batch._replace(loss_mask_BT=array((1, ROWS, T), jnp.bool_, (None, "batch", None)))
    state = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        abstract_state(model, optimizer),
        where,
    )
    jax.jit(step, donate_argnums=0, out_shardings=(where, None)).lower(state, batch).compile()
    print("compiled")


if __name__ == "__main__":
    main(sys.argv[1], {axis: int(size) for axis, size in (a.split("=") for a in sys.argv[2:])})
