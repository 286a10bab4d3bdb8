"""Maps the fields of a row to the tags of the trackers (TensorBoard, Weights & Biases).

A tag is GROUP/NAME, with one of five groups: train, eval, router, speed, data.  metrics.jsonl uses
the field names without a group.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moe_jax.config import Config

# Group -> fields; `eval_...` belongs to eval, and every field not listed here to train.
_GROUPS = {
    "router": (
        "assignments",
        "kept",
        "dropped_capacity",
        "dropped_buffer",
        "unsampled",
        "padding",
        "dropped",
        "unaccounted",
        "lost_tokens",
        "drop_fraction",
        "load_max_over_mean",
        "load_violation",
        "kept_weight",
        "dead_experts",
        "router_entropy",
        "layers",
    ),
    "speed": (
        "tokens_per_second",
        "step_seconds",
        "data_wait_seconds",
        "model_tflops_per_second",
        "mfu",
    ),
    "data": ("tokens", "step_tokens", "epochs", "max_epochs"),
}
_GROUP_OF = {field: group for group, fields in _GROUPS.items() for field in fields}
_EVAL = "eval_"
LOAD = "router/load"  # the heat map
TEXTS = {"config": "train/config", "samples": "eval/samples"}


def scalars(row: Mapping[str, Any], hidden: Collection[str]) -> Iterator[tuple[str, float]]:
    """Yield the (tag, number) pairs of a row; names of nested fields are joined by `/`.

    Args:
      row: a row of metrics.jsonl; values that are not numbers (mfu on a CPU) have no tag.
      hidden: fields to leave out, also below `layers`.
    """
    for field, value in row.items():
        if field == "step" or field in hidden:
            continue
        if field.startswith(_EVAL):
            yield from _numbers(value, f"eval/{field.removeprefix(_EVAL)}")
        elif field == "layers":
            for name, by_layer in value.items():
                if name not in hidden:
                    yield from _numbers(by_layer, f"router/{name.removeprefix('router_')}")
        else:
            group = _GROUP_OF.get(field, "train")
            yield from _numbers(value, f"{group}/{field.removeprefix('router_')}")


def unused(config: Config) -> frozenset[str]:
    """The fields of a row that are meaningless under this config, such as losses of weight 0."""
    model, hidden = config.model, set()
    if model.dense:
        hidden.update(_GROUPS["router"])
    if model.dense or model.moe.balance_weight == 0:
        hidden.add("balance_loss")
    if model.dense or model.moe.z_weight == 0:
        hidden.add("z_loss")
    if model.logits_z_weight == 0:
        hidden.add("logits_z_loss")
    if config.train.spike_factor == 0:
        hidden.update(("spike", "skipped_spikes"))
    if len(config.data.mixture) < 2:
        hidden.add("eval_loss_by_source")
    return frozenset(hidden)


def _numbers(value: Any, tag: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(part, f"{tag}/{name}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _numbers(part, f"{tag}/layer_{index:02d}")
    elif isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
        yield tag, float(value)
