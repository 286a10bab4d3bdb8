"""What is put through a layer: its sizes and knobs, and the arrays of five scenarios.

All numbers are rounded here, to bfloat16 where a layer in bfloat16 would round them, so that every
dtype sees the same ones and only the arithmetic differs.  Competing scores lie far enough apart for
float32 to choose as float64 does.
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
ROWS = 2  # rows in a routing group: the most that a device holds on every mesh below
SOURCES = 3  # of the data

MESHES = {
    "one_device": MeshConfig(data=1),
    "data8": MeshConfig(data=8),
    "expert8": MeshConfig(data=1, expert=8),
    "data2_expert4": MeshConfig(data=2, expert=4),
    "expert2_tensor2": MeshConfig(data=1, expert=2, tensor=2),
    "fsdp2_expert4": MeshConfig(data=1, fsdp=2, expert=4),
}
# Knobs that a plain run leaves at their neutral value; a router not listed keeps its own.
OPTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"logit_cap": 20.0},
    "sigmoid_bias": {"expert_groups": 4, "top_groups": 2, "routed_scale": 2.5},
    "hash": {"table_size": 64},
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One MoE layer as it is compiled."""

    model: ModelConfig  # its width, experts and remat
    mesh: MeshConfig
    dtype: str
    train: bool = True
    microbatches: int = 1

    @property
    def components(self) -> Components:
        """Its router and dispatch path."""
        return make_components(self.model.moe)


class Case(NamedTuple):
    """One batch and one set of weights, in NumPy; rows come first in all but the weights."""

    params: Any  # by the MoE module's names
    state: Any
    x_BTD: Any
    mask_BT: Any
    token_ids_BT: Any
    sources_BT: Any
    keys_B2: Any  # key data of threefry2x32
    cotangent_BTD: Any  # of the output


def layer(router: str, dispatch: str, mesh: str, dtype: str, remat: bool) -> Layer:
    """A layer of the sizes above, so tight that bounded paths drop.

    Three choices where a router has no number of its own, so that K is 1, 2, 3 and E in turn.
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
    """float64 of the nearest bfloat16 numbers."""
    return np.asarray(array, np.float32).astype(jnp.bfloat16).astype(np.float64)


def draw(seed: int, model: ModelConfig, rows: int, positions: int) -> Case:
    """Random tokens, none of them padding, and random weights.

    Feature 0 of every token is 1, so that row 0 of a router matrix is a bias.
    """
    rng = np.random.default_rng(seed)
    moe, width = model.moe, model.width
    experts, F = moe.num_experts, moe.expert_width
    router = make_router(moe)
    x_BTD = rng.normal(size=(rows, positions, width))
    x_BTD[..., 0] = 1
    # The main matrix decides clearly; another one, of noise, keeps its softplus away from zero.
    params = {
        f"router_{name}": rng.normal(size=spec.shape)
        * ((1.6 if name == "kernel" else 0.5) / np.sqrt(width))
        for name, spec in router.param_specs(width, experts).items()
    }
    gates = 1 if model.activation == "gelu" else 2
    params["w_in_EDUF"] = rng.normal(size=(experts, width, gates, F)) / np.sqrt(width)
    params["w_out_EFD"] = rng.normal(size=(experts, F, width)) / np.sqrt(F)
    # Distinct and too small to decide alone.
    state = {
        name: (rng.permutation(np.prod(spec.shape)).reshape(spec.shape) + 1) / 32
        for name, spec in router.state_specs(experts).items()
    }
    return Case(
        # Routers compute in float32 whatever the dtype, and must not lose what bfloat16 would.
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
    """Row 0 of the router's main matrix, where it has one, set to `bias_E`."""
    if "router_kernel" not in case.params:
        return case
    kernel = case.params["router_kernel"].copy()
    kernel[0] = np.float32(bias_E)
    return case._replace(params={**case.params, "router_kernel": kernel})


def even(case: Case) -> Case:
    """Token n prefers expert n, then n + 1, then n + 2, modulo E."""
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
    """Expert 0 is popular and expert 7 is not."""
    return _biased(case, np.linspace(2, -2, E))._replace(token_ids_BT=case.token_ids_BT % 5)


def empty(case: Case) -> Case:
    """Nothing for experts 2 to 5."""
    bias_E = np.where((np.arange(E) < 2) | (np.arange(E) > 5), 0.0, -60.0)
    return _biased(case, bias_E)._replace(token_ids_BT=case.token_ids_BT % 2)


def one_expert(case: Case) -> Case:
    """Expert 5 is everyone's first choice."""
    return _biased(case, 9.0 * (np.arange(E) == 5))._replace(token_ids_BT=case.token_ids_BT * 0)


def padded(case: Case) -> Case:
    """Rows of all lengths, and whole rows, groups and devices of padding."""
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
    """Name -> arrays, for a layer of the sizes above."""
    return {
        name: change(draw(seed, model, B, T))
        for seed, (name, change) in enumerate(SCENARIOS.items())
    }
