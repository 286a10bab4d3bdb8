"""The table of dispatch paths: adding one is a file and a line."""

from moe_jax.moe.dispatch.capacity import Capacity
from moe_jax.moe.dispatch.dense import Dense
from moe_jax.moe.dispatch.dropless import Dropless
from moe_jax.moe.dispatch.einsum import Einsum

DISPATCH = {
    "dense": Dense,
    "einsum": Einsum,
    "capacity": Capacity,
    "dropless": Dropless,
}
