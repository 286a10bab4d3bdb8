"""The table of dispatch paths: a new path is one file and one entry here."""

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
