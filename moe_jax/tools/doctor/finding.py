"""The result of one check."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report, its details, and how to fix a failure."""

    ok: bool
    figure: str  # the measurement
    fix: str = ""  # one sentence that says what to change; printed after a failure or a warning
    warns: bool = False  # True: `fix` is advice; the check has not failed
    details: tuple[str, ...] = ()  # lines printed below the figure


def name_layers(layers: list[int], of: int) -> str:
    """Name layers in a sentence: `layer 3`, `layers 1 and 3`, or `all MoE layers`.

    Args:
      layers: their numbers, at least one.
      of: number of MoE layers.
    """
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) == of:
        return "all MoE layers"
    return f"layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}"
