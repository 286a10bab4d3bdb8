"""The inputs of the conformance tests: sizes and knobs of a layer, and arrays of five scenarios.

All numbers are rounded here, to bfloat16 if a layer in bfloat16 would round them, so that every
dtype gets the same inputs and only the arithmetic differs.  Competing scores differ enough for
float32 to choose the same experts as float64.  B rows, T positions, D width, E experts, F expert
width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.model.config import ModelConfig
from moe_jax.moe.components import Components, make_components, make_router
from moe_jax.moe.config import MoEConfig
from moe_jax.parallel.mesh import MeshConfig

B, T, D, E, F = 16, 8, 16, 8, 12
ROWS = 2  # rows per routing group, the most that fit on a device of every mesh below
SOURCES = 3  # number of data sources

MESHES = {
    "one_device": MeshConfig(data=1),
    "data8": MeshConfig(data=8),
    "expert8": MeshConfig(data=1, expert=8),
    "data2_expert4": MeshConfig(data=2, expert=4),
    "expert2_tensor2": MeshConfig(data=1, expert=2, tensor=2),
    "fsdp2_expert4": MeshConfig(data=1, fsdp=2, expert=4),
}
# Values of knobs whose defaults have no effect; other routers keep their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"logit_cap": 20.0},
    "sigmoid_bias": {"expert_groups": 4, "top_groups": 2, "routed_scale": 2.5},
    "hash": {"table_size": 64},
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """The settings that one MoE layer is compiled with."""

    model: ModelConfig  # its width, experts and remat
    mesh: MeshConfig
    dtype: str
    train: bool = True
    microbatches: int = 1

    @property
    def components(self) -> Components:
        """The layer's router and dispatch path."""
        return make_components(self.model.moe)


class Case(NamedTuple):
    """One batch and one set of weights as NumPy arrays; batch arrays begin with the row axis."""

    params: Any  # by the MoE module's names
    state: Any
    x_BTD: Any
    mask_BT: Any
    token_ids_BT: Any
    sources_BT: Any
    keys_B2: Any  # key data of threefry2x32
    cotangent_BTD: Any  # of the output


def layer(router: str, dispatch: str, mesh: str, dtype: str, remat: bool) -> Layer:
    """Make a layer of the sizes above, with a capacity at which bounded paths drop.

    K is 3 if the router does not fix it, so that over all routers K is 1, 2, 3 and E.
    """
    moe = MoEConfig(
        num_experts=E,
        expert_width=F,
        top_k=3,
        router=router,
        dispatch=dispatch,
        capacity_factor=1.0,
        group_rows=ROWS,
        options={router: OPTIONS.get(router, {})},
    )
    model = ModelConfig(width=D, remat="full" if remat else "none", moe=moe)
    return Layer(model, MESHES[mesh], dtype)


def rounded(array: Any) -> np.ndarray:
    """Round to bfloat16 and return float64."""
    return np.asarray(array, np.float32).astype(jnp.bfloat16).astype(np.float64)


def draw(seed: int, model: ModelConfig, rows: int, positions: int) -> Case:
    """Draw random tokens without padding, and random weights.

    Feature 0 of every token is 1, so that row 0 of a router matrix is a bias.

    Args:
      seed: of the random numbers.
      model: the sizes of the layer.
      rows: number of rows.
      positions: tokens per row.
    """
    rng = np.random.default_rng(seed)
    moe, width = model.moe, model.width
    experts, F = moe.num_experts, moe.expert_width
    router = make_router(moe)
    x_BTD = rng.normal(size=(rows, positions, width))
    x_BTD[..., 0] = 1
    # Large weights in the main matrix separate the scores; small ones in a noise matrix keep its
    # softplus away from zero.
    params = {
        f"router_{name}": rng.normal(size=spec.shape)
        * ((1.6 if name == "kernel" else 0.5) / np.sqrt(width))
        for name, spec in router.param_specs(width, experts).items()
    }
    gates = 1 if model.activation == "gelu" else 2
    params["w_in_EDUF"] = rng.normal(size=(experts, width, gates, F)) / np.sqrt(width)
    params["w_out_EFD"] = rng.normal(size=(experts, F, width)) / np.sqrt(F)
    # Distinct values, too small to decide the routing alone.
    state = {
        name: (rng.permutation(np.prod(spec.shape)).reshape(spec.shape) + 1) / 32
        for name, spec in router.state_specs(experts).items()
    }
    return Case(
        # Routers compute in float32 in every dtype, so their weights keep float32's digits.
        {
            name: np.float32(value).astype(np.float64) if "router" in name else rounded(value)
            for name, value in params.items()
        },
        {name: np.float32(value).astype(np.float64) for name, value in state.items()},
        rounded(x_BTD),
        np.ones((rows, positions), bool),
        rng.integers(0, 1000, (rows, positions)).astype(np.int32),
        rng.integers(0, SOURCES, (rows, positions)).astype(np.int32),
        rng.integers(0, 2**32, (rows, 2), np.uint32),
        rounded(rng.normal(size=(rows, positions, width))),
    )


def _biased(case: Case, bias_E: Any) -> Case:
    """Set row 0 of the router's main matrix, if it has one, to `bias_E`."""
    if "router_kernel" not in case.params:
        return case
    kernel = case.params["router_kernel"].copy()
    kernel[0] = np.float32(bias_E)
    return case._replace(params={**case.params, "router_kernel": kernel})


def even(case: Case) -> Case:
    """Let token n prefer expert n, then n + 1, then n + 2, modulo E."""
    number = np.arange(B * T).reshape(B, T)
    rng = np.random.default_rng(0)
    x_BTD = case.x_BTD.copy()
    x_BTD[..., 1 : E + 1] = sum((4 - k) * np.eye(E)[(number + k) % E] for k in range(3))
    x_BTD[..., 1 : E + 1] += 0.1 * rng.normal(size=(B, T, E))
    ids_BT = number.astype(np.int32)
    case = case._replace(x_BTD=rounded(x_BTD), token_ids_BT=ids_BT)
    if "router_kernel" in case.params:
        kernel = np.zeros((D, E))
        kernel[1 : E + 1] = np.eye(E)
        case = case._replace(params={**case.params, "router_kernel": kernel})
    return case


def skewed(case: Case) -> Case:
    """Make the load fall from expert 0 to expert 7."""
    return _biased(case, np.linspace(2, -2, E))._replace(token_ids_BT=case.token_ids_BT % 5)


def empty(case: Case) -> Case:
    """Leave experts 2 to 5 without tokens."""
    bias_E = np.where((np.arange(E) < 2) | (np.arange(E) > 5), 0.0, -60.0)
    return _biased(case, bias_E)._replace(token_ids_BT=case.token_ids_BT % 2)


def one_expert(case: Case) -> Case:
    """Make expert 5 the first choice of every token."""
    return _biased(case, 9.0 * (np.arange(E) == 5))._replace(token_ids_BT=case.token_ids_BT * 0)


def padded(case: Case) -> Case:
    """Use rows of all lengths, and whole rows, groups and devices of padding."""
    lengths = np.array([8, 3, 0, 0, 1, 8, 7, 5, 8, 8, 0, 2, 6, 8, 4, 0])
    return case._replace(mask_BT=np.arange(T) < lengths[:, None])


SCENARIOS = {
    "even": even,
    "skewed": skewed,
    "empty": empty,
    "one_expert": one_expert,
    "padded": padded,
}


def scenarios(model: ModelConfig) -> dict[str, Case]:
    """Make the arrays of every scenario for a layer of the sizes above, by name."""
    return {
        name: change(draw(seed, model, B, T))
        for seed, (name, change) in enumerate(SCENARIOS.items())
    }
