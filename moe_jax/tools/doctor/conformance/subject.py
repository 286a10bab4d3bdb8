"""Runs the package's MoE layer on a mesh, placed as in the trainer, with remat as in the model.

B rows, T positions, D width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moe_jax.moe.layer import MoE
from moe_jax.moe.types import MoEContext
from moe_jax.nn.params import param_dtype
from moe_jax.nn.remat import remat
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import param_sharding, sharding
from moe_jax.tools.doctor.conformance.cases import SOURCES, Case, Layer
from moe_jax.tools.doctor.conformance.oracle import AUX_WEIGHT, Outcome


def compiled(layer: Layer) -> Callable[[Case], Outcome]:
    """Make a function of a batch; it is compiled at the first call, for one shape."""
    function, shardings = forward_backward(layer, mesh_of(layer))
    step = jax.jit(function, in_shardings=shardings)

    def run(case: Case) -> Outcome:
        parts = [
            jax.device_get(step(*arguments(layer, batch, int(case.mask_BT.sum()))))
            for batch in _microbatches(case, layer.microbatches)
        ]
        return _joined(parts)

    return run


def mesh_of(layer: Layer) -> Mesh:
    """Make the layer's mesh on the first devices of this machine."""
    sizes = layer.mesh
    return make_mesh(sizes, jax.devices()[: sizes.batch_shards * sizes.tensor])


def forward_backward(layer: Layer, mesh: Mesh) -> tuple[Callable, tuple]:
    """Make the function to compile, and the shardings of its `arguments`.

    It returns ((loss, (y_BTD, aux)), (gradients of the parameters, gradient of the tokens)).
    """
    model, dtype = layer.model, jnp.dtype(layer.dtype)
    sizes = {"activation": model.activation, "depth": model.num_layers}

    def make() -> MoE:
        return MoE(model.moe, model.width, **sizes, dtype=dtype, rngs=nnx.Rngs(params=0))

    graph, abstract = nnx.split(nnx.eval_shape(make), nnx.Param)

    def loss(params, x_BTD, case: Case, tokens):
        def run(params, x_BTD, context):
            return nnx.merge(graph, params)(x_BTD, context)

        context = _context(layer, case, mesh)
        y_BTD, aux = remat(run, layer.model.remat, scanned=False)(params, x_BTD, context)
        total = (y_BTD.astype(case.cotangent_BTD.dtype) * case.cotangent_BTD).sum()
        # Divide by the whole batch's tokens, so that the results of microbatches can be added.
        total += AUX_WEIGHT * (aux.router.balance.sum + aux.router.z.sum) / tokens
        return total, (y_BTD, aux)

    placed = {
        str(name): param_sharding(mesh, leaf.get_metadata("logical_axes"), leaf.shape)
        for name, leaf in abstract.items()
    }
    by_rows, everywhere = sharding(mesh, ("batch",)), sharding(mesh, ())
    cases = Case(None, everywhere, None, *[by_rows] * 5)
    return (
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True),
        (placed, by_rows, cases, everywhere),
    )


def arguments(layer: Layer, case: Case, tokens: int) -> tuple:
    """The arguments of the function of `forward_backward`.

    Args:
      layer: the layer.
      case: its inputs, of a batch or a microbatch.
      tokens: tokens of the whole batch that are not padding.
    """
    dtype = jnp.dtype(layer.dtype)
    wide = param_dtype(dtype)
    params = {name: value.astype(wide) for name, value in case.params.items()}
    rest = case._replace(
        params=None,
        x_BTD=None,
        state={name: value.astype(wide) for name, value in case.state.items()},
        cotangent_BTD=case.cotangent_BTD.astype(wide),
    )
    return params, case.x_BTD.astype(dtype), rest, np.asarray(max(tokens, 1), wide)


def _context(layer: Layer, case: Case, mesh: Mesh) -> MoEContext:
    return MoEContext(
        token_ids_BT=case.token_ids_BT,
        mask_BT=case.mask_BT,
        row_keys_B=jax.random.wrap_key_data(case.keys_B2, impl="threefry2x32"),
        mesh=mesh,
        train=layer.train,
        router_state=case.state,
        sources_BT=case.sources_BT,
        num_sources=SOURCES,
    )


def _microbatches(case: Case, count: int) -> list[Case]:
    """Split the rows into `count` equal parts."""
    by_rows = [field for field in Case._fields if field not in ("params", "state")]
    pieces = {field: np.split(getattr(case, field), count) for field in by_rows}
    return [case._replace(**{f: pieces[f][n] for f in by_rows}) for n in range(count)]


def _joined(parts: list[Any]) -> Outcome:
    """Join the results of microbatches: concatenate rows, add sums."""
    auxes = [aux for (_, (_, aux)), _ in parts]
    aux = jax.tree.map(lambda *leaves: sum(leaves), *auxes)
    stats, ledger = aux.stats, aux.ledger
    means = {name: mean for name, mean in aux.router._asdict().items() if mean is not None}
    return Outcome(
        np.concatenate([y_BTD for (_, (y_BTD, _)), _ in parts]),
        np.concatenate([x_BTD for _, (_, x_BTD) in parts]),
        jax.tree.map(lambda *leaves: sum(leaves), *(params for _, (params, _) in parts)),
        {name: mean.sum for name, mean in means.items()},
        np.stack([mean.count for mean in means.values()]),
        {"total": stats.outcomes, **ledger._asdict()},
        stats.assignments,
        stats.lost_tokens,
    )
