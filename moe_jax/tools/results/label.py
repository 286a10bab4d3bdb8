"""Labels runs by the keys in which their configs differ, short enough for a plot."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.config import Config

MAX_LABEL = 44  # characters of a label in a plot; a mixture may be longer
MAX_SOURCES = 4  # sources of a mixture that a label names
MIXTURE = "data.mixture"


def label(settings: Mapping[str, Any]) -> str:
    """Make a label such as `num_experts=8 router=switch`; "base" if `settings` is empty.

    Args:
      settings: key -> value of the keys that differ between runs: dotted keys of the config, and
        MIXTURE with the text of `mixture`.
    """
    words, names = [], _names(settings)
    for key, value in settings.items():
        if key == MIXTURE:
            words += [value] if value else []
        elif key.startswith(f"{MIXTURE}.") and key.endswith(".weight"):
            continue  # the mixture's shares show the weights
        elif value is True:
            words.append(names[key])
        elif value is not False or len(settings) == 1:
            words.append(f"{names[key]}={_short(value)}")
    return " ".join(words) or "base"


def mixture(config: Config) -> str:
    """Describe the mixture: `mixture code 70% prose 30%`, largest first; empty: one source."""
    entries = config.data.entries
    whole = sum(entry.weight for entry in entries.values())
    order = sorted(entries, key=lambda name: -entries[name].weight)
    words = [f"{name} {entries[name].weight / whole:.0%}" for name in order[:MAX_SOURCES]]
    if len(order) > MAX_SOURCES:
        words.append(f"and {len(order) - MAX_SOURCES} more")
    return " ".join(("mixture", *words)) if entries else ""


def short_labels(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Make a short label for each run.

    If it is short enough, a label has all keys in which the runs differ.  Otherwise runs are
    labelled by their folders and, if there is room, by few keys that distinguish all runs.

    Args:
      settings: for each run, the argument of `label`.
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
    """Choose few keys that distinguish all runs (greedy, the key with the most values first)."""
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
    """Shorten each dotted key to its last parts, as many as make it unique."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        alone = (end for end in ends if sum(f".{k}".endswith(f".{end}") for k in keys) == 1)
        found[key] = next(alone, key)
    return found


def _short(value: Any) -> str:
    """Format a number with at most four digits, and a long path by its end."""
    return f"{value:.4g}" if isinstance(value, float) else _end(str(value))


def _end(text: str, most: int = MAX_LABEL) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"
