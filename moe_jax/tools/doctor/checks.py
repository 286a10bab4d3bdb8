"""Maps the name of every check to its function of a Subject; add a check here.

Checks of the initial parameters must come before those that run steps.
"""

from collections.abc import Callable

from moe_jax.tools.doctor.balance import balance_at_uniform, balance_gradient
from moe_jax.tools.doctor.balance_pull import balance_pull
from moe_jax.tools.doctor.branch_scale import branch_scale
from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.fit import data_wait, divides, memory, saves_bitwise
from moe_jax.tools.doctor.learning import gradients_arrive, router_gradient, step_changes
from moe_jax.tools.doctor.start import activations, capacity, expert_init, first_loss
from moe_jax.tools.doctor.subject import Subject

CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "mesh, batch and groups divide": divides,
    "memory against the device": memory,
    "expert init std": expert_init,
    "loss at init is log V": first_loss,
    "activation scale": activations,
    "MoE output against its dense twin": branch_scale,
    "capacity and drops": capacity,
    "balance is 1 at uniform": balance_at_uniform,
    "balance gradient on any mesh": balance_gradient,
    "router's language-model gradient": router_gradient,
    "balance gradient to the router": balance_pull,
    "every parameter has a gradient": gradients_arrive,
    "a step changes every parameter": step_changes,
    "save, restore, bitwise": saves_bitwise,
    "wait for data": data_wait,
}
