"""The table of routers: a new router is one file and one entry here."""

from moe_jax.moe.routers.expert_choice import ExpertChoiceRouter
from moe_jax.moe.routers.gshard import GShard
from moe_jax.moe.routers.hash import Hash
from moe_jax.moe.routers.noisy_top_k import NoisyTopK
from moe_jax.moe.routers.sigmoid_bias import SigmoidBias
from moe_jax.moe.routers.soft import Soft
from moe_jax.moe.routers.switch import Switch
from moe_jax.moe.routers.top_k import TopK

ROUTERS = {
    "switch": Switch,
    "gshard": GShard,
    "top_k": TopK,
    "noisy_top_k": NoisyTopK,
    "sigmoid_bias": SigmoidBias,
    "expert_choice": ExpertChoiceRouter,
    "hash": Hash,
    "soft": Soft,
}
