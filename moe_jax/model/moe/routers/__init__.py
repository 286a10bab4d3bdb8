"""The table of routers: adding one is a file and a line."""

from moe_jax.model.moe.routers.gshard import GShard
from moe_jax.model.moe.routers.switch import Switch
from moe_jax.model.moe.routers.top_k import TopK

ROUTERS = {
    "switch": Switch,
    "gshard": GShard,
    "top_k": TopK,
}
