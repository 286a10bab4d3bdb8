"""Compiles the train step of a small model on eight devices: `compile_step.py DISPATCH data=2 ...`.

It runs as a separate process, so that a test can read everything XLA logs.  The dispatch path
`all_at_once` is the control: XLA can reshard its backward pass only by full replication.
"""

import sys

import jax
import jax.numpy as jnp

from moe_jax.config import Config
from moe_jax.data.config import DataConfig
from moe_jax.model.config import ModelConfig
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.dispatch.dense import Dense
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.sections import TrainConfig
from moe_jax.tools.plan.lowering import lower, make_plan


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
        return y_ND.reshape(G, S, D), kept_GSK


DISPATCH["all_at_once"] = AllAtOnce


def main(dispatch: str, sizes: dict[str, int]) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    moe = MoEConfig(num_experts=8, expert_width=64, dispatch=dispatch, group_rows=2)
    config = Config(
        mesh=MeshConfig(**{"data": 1, **sizes}),
        model=ModelConfig(vocab_size=256, num_layers=2, width=64, head_dim=16, moe=moe),
        data=DataConfig(sequence_length=32),
        train=TrainConfig(batch_size=16),
    )
    lower(make_plan(config, 8), jax.devices()).compile()
    print("compiled")


if __name__ == "__main__":
    main(sys.argv[1], {axis: int(size) for axis, size in (a.split("=") for a in sys.argv[2:])})
