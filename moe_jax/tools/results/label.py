"""What runs are called: the keys in which their configs differ, short enough for a plot."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.config import Config

MAX_LABEL = 44  # characters of a label in a plot; a mixture may be longer
MAX_SOURCES = 4  # of a mixture that are named
MIXTURE = "data.mixture"


def label(settings: Mapping[str, Any]) -> str:
    """Such as `num_experts=8 router=switch`; "base" where `settings` is empty.

    Args:
      settings: key -> value, of the keys that tell runs apart: dotted keys of the config, and
        MIXTURE with what `mixture` says.
    """
    words, names = [], _names(settings)
    for key, value in settings.items():
        if key == MIXTURE:
            words += [value] if value else []
        elif key.startswith(f"{MIXTURE}.") and key.endswith(".weight"):
            continue  # the shares say it
        elif value is True:
            words.append(names[key])
        elif value is not False or len(settings) == 1:
            words.append(f"{names[key]}={_short(value)}")
    return " ".join(words) or "base"


def mixture(config: Config) -> str:
    """Such as `mixture code 70% prose 30%`, largest first; empty where there is one source."""
    entries = config.data.entries
    whole = sum(entry.weight for entry in entries.values())
    order = sorted(entries, key=lambda name: -entries[name].weight)
    words = [f"{name} {entries[name].weight / whole:.0%}" for name in order[:MAX_SOURCES]]
    if len(order) > MAX_SOURCES:
        words.append(f"and {len(order) - MAX_SOURCES} more")
    return " ".join(("mixture", *words)) if entries else ""


def short_labels(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """A label for each of several runs.

    All keys in which they differ, where that is short.  Runs that have little in common are called
    by their folders, with the fewest keys that tell all of them apart where there is room.

    Args:
      settings: of each run, as `label` takes them.
      names: folders of the runs.
    """
    full = [label(each) for each in settings]
    if all(len(text) <= MAX_LABEL for text in full):
        return full
    keys, found = _telling(settings), []
    for each, name in zip(settings, names, strict=True):
        few = {key: value for key, value in each.items() if key in keys}
        text = f"{name}: {label(few)}" if few else name
        blend = each.get(MIXTURE)
        if blend:
            found.append(f"{_end(name, MAX_LABEL // 2)}: {blend}")
        else:
            found.append(text if len(text) <= MAX_LABEL else _end(name))
    return found


def _telling(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Few keys that tell all runs apart; that with the most values is chosen first."""
    rest = dict.fromkeys(itertools.chain.from_iterable(settings))
    chosen: list[str] = []

    def kinds(keys: Sequence[str]) -> int:
        return len({json.dumps([each.get(key) for key in keys]) for each in settings})

    while rest:
        best = max(rest, key=lambda key: kinds([*chosen, key]))
        if kinds([*chosen, best]) == kinds(chosen):
            break
        chosen.append(best)
        del rest[best]
    return set(chosen)


def _names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Each dotted key by its last part, or by as many as no other of them ends with."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        alone = (end for end in ends if sum(f".{k}".endswith(f".{end}") for k in keys) == 1)
        found[key] = next(alone, key)
    return found


def _short(value: Any) -> str:
    """`value` with at most four digits, and a path by its end."""
    return f"{value:.4g}" if isinstance(value, float) else _end(str(value))


def _end(text: str, most: int = MAX_LABEL) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"
