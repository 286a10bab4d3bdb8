"""Checks that every parameter is told what to do, and does it."""

import numpy as np

from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.start import NO_EXPERTS, layer_of
from moe_jax.tools.doctor.subject import Subject

# Of the norm over all parameters.  Where weights are constant in exact arithmetic, rounding leaves
# some 1e-8 of it.
LEAST_SHARE = 1e-6
NAMED = 4  # parameters that a line names


def router_gradient(subject: Subject) -> Finding:
    """Norm of the language-model loss's gradient for the router, in the worst layer."""
    if not subject.moe_layers:
        return NO_EXPERTS
    moe, gradients = subject.config.model.moe, subject.probe.gradients
    norms = {name: float(gradients[name]) for name in subject.router_parameters}
    if not norms:
        return Finding(True, f"router {moe.router} has no parameters (0 of them)")
    if moe.freeze_router:
        return Finding(True, f"frozen: model.moe.freeze_router is True ({len(norms)} parameters)")
    whole = float(np.sqrt(sum((g**2).sum() for g in gradients.values())))
    worst = min(norms, key=lambda name: norms[name])
    return Finding(
        norms[worst] > LEAST_SHARE * whole,
        f"norm {norms[worst]:.3g} in layer {layer_of(worst)}, the worst; {whole:.3g} of the model",
        "Let the combine weights carry the router's gradient: no softmax over one logit, no "
        "renormalising at top_k=1, no stop_gradient on weights.",
    )


def gradients_arrive(subject: Subject) -> Finding:
    """Every parameter, and of experts each one that a token reached."""
    reached = {name: np.asarray(norm > 0) for name, norm in subject.probe.gradients.items()}
    return _all_of(
        subject, reached, "has a gradient", "Use every parameter in the loss, or remove it"
    )


def step_changes(subject: Subject) -> Finding:
    """One step at the peak learning rate."""
    steps = subject.first_steps()
    if steps.skipped:
        return Finding(
            False,
            "0 parameters changed: the step was skipped",
            "Find what is not finite: lower optimizer.learning_rate or use precision float32.",
        )
    return _all_of(
        subject,
        steps.changed,
        "changes",
        "Hand every parameter to the optimizer, or raise its rate",
    )


def _all_of(subject: Subject, good: dict[str, np.ndarray], verb: str, fix: str) -> Finding:
    """Names what is not good, frozen routers and experts without a token aside."""
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
    figure = f"{total - len(bad) - len(idle)} of {total} parameters, experts counted singly"
    if idle:
        figure += f"; no token reached {_some(sorted(set(idle)))}"
    if bad:
        figure += f"; not {_some(bad)}"
    return Finding(not bad, figure, f"{fix}: not one of these {verb}: {_some(bad)}.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
