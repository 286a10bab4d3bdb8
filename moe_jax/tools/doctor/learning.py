"""Checks that every parameter gets a gradient and that a step changes it."""

import numpy as np

from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.start import NO_EXPERTS, layer_of
from moe_jax.tools.doctor.subject import Subject

# Share of the gradient norm of all parameters.  If the combine weights are constant in exact
# arithmetic, rounding leaves about 1e-8.
LEAST_SHARE = 1e-6
NAMED = 4  # most parameters that a line names


def router_gradient(subject: Subject) -> Finding:
    """Check the norm of the router's language-model gradient, in the layer where it is least."""
    if not subject.moe_layers:
        return NO_EXPERTS
    moe, gradients = subject.config.model.moe, subject.probe.gradients
    norms = {name: float(gradients[name]) for name in subject.router_parameters}
    if not norms:
        return Finding(True, f"router {moe.router} has no parameters")
    if moe.freeze_router:
        return Finding(True, f"frozen: model.moe.freeze_router is True ({len(norms)} parameters)")
    whole = float(np.sqrt(sum((g**2).sum() for g in gradients.values())))
    worst = min(norms, key=lambda name: norms[name])
    return Finding(
        norms[worst] > LEAST_SHARE * whole,
        f"least norm {norms[worst]:.3g} in layer {layer_of(worst)}; whole model {whole:.3g}",
        "Let the router's gradient pass through the combine weights: no softmax over one logit, "
        "no renormalising at top_k=1, no stop_gradient on weights.",
    )


def gradients_arrive(subject: Subject) -> Finding:
    """Check that every parameter has a gradient, and every expert with kept assignments."""
    reached = {name: np.asarray(norm > 0) for name, norm in subject.probe.gradients.items()}
    return _all_of(
        subject, reached, "has a gradient", "Use every parameter in the loss, or remove it"
    )


def step_changes(subject: Subject) -> Finding:
    """Check that one step at the peak learning rate changes every parameter."""
    steps = subject.first_steps()
    if steps.skipped:
        return Finding(
            False,
            "0 parameters changed: the step was skipped",
            "Lower optimizer.learning_rate or set precision to float32: a value is not finite.",
        )
    return _all_of(
        subject,
        steps.changed,
        "changes",
        "Pass every parameter to the optimizer, or raise its rate",
    )


def _all_of(subject: Subject, good: dict[str, np.ndarray], verb: str, fix: str) -> Finding:
    """List the parameters that fail, except frozen routers and experts without tokens."""
    frozen = subject.config.model.moe.freeze_router
    place = {str(layer): i for i, layer in enumerate(subject.moe_layers)}
    bad, idle = [], []
    for name, value in good.items():
        if frozen and name in subject.router_parameters:
            continue
        for expert in np.flatnonzero(~np.atleast_1d(value)):
            if value.ndim and not subject.probe.kept[place[layer_of(name)]][expert]:
                idle.append(f"layer {layer_of(name)} expert {expert}")
            else:
                bad.append(f"{name}[{expert}]" if value.ndim else name)
    total = sum(value.size for value in good.values())
    figure = f"{total - len(bad) - len(idle)} of {total} parameters, each expert counted"
    if idle:
        figure += f"; no token reached {_some(sorted(set(idle)))}"
    if bad:
        figure += f"; not {_some(bad)}"
    return Finding(not bad, figure, f"{fix}: none of these {verb}: {_some(bad)}.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
