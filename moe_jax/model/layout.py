"""Converts between a tree with one subtree per layer and a tree with stacked (scanned) layers.

Per layer:  {"blocks": {"0": tree, "1": tree, ...}, ...}
Stacked:    {"stack": {"0": tree, ...}, "blocks": {...the rest...}, ...}

"stack" holds one tree per block of the repeating period, whose leaves have a leading axis of size
`repeats`.  The functions take any tree of this form: parameters, moments, logical axes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """Layers [prefix, prefix + period * repeats) are scanned; all others are unrolled."""

    num_layers: int  # L, scanned or not
    prefix: int = 0  # unrolled layers before the scanned ones; 0: none
    period: int = 1  # layers per repeat
    repeats: int = 0  # repeats of the period; 0: nothing is scanned

    @property
    def end(self) -> int:
        """The first layer after the scanned ones."""
        return self.prefix + self.period * self.repeats

    def unrolled(self) -> list[int]:
        """The layers that are not scanned.

        Returns:
          Their indices from 0, in order.
        """
        return [*range(self.prefix), *range(self.end, self.num_layers)]


def make_layout(config: ModelConfig) -> LayerLayout:
    """Make the layout: scan the period of dense and MoE blocks if it repeats, else unroll all.

    Without `config.scan_layers` all layers are unrolled.
    """
    prefix = 0 if config.dense else min(config.moe.first_dense, config.num_layers)
    period = 1 if config.dense else config.moe.every
    repeats = (config.num_layers - prefix) // period
    if not config.scan_layers or repeats < 2:
        return LayerLayout(config.num_layers)
    return LayerLayout(config.num_layers, prefix, period, repeats)


def to_stacked(
    tree: Mapping[str, Any],
    layout: LayerLayout,
    stack: Callable[..., Any] = lambda *leaves: jnp.stack(leaves),
    is_leaf: Callable[[Any], bool] | None = None,
) -> dict[str, Any]:
    """Convert a per-layer tree to a stacked tree.

    Args:
      tree: per layer.
      layout: decides which layers are stacked.
      stack: joins the leaves of all layers at one position of the period.
      is_leaf: as in jax.tree.map; None: the default leaves.

    Returns:
      The stacked tree; `tree` itself, copied, if nothing is scanned.
    """
    if not layout.repeats:
        return dict(tree)
    blocks = tree["blocks"]
    stacked = {}
    for position in range(layout.period):
        layers = range(layout.prefix + position, layout.end, layout.period)
        trees = [blocks[str(layer)] for layer in layers]
        stacked[str(position)] = jax.tree.map(stack, *trees, is_leaf=is_leaf)
    rest = {str(layer): blocks[str(layer)] for layer in layout.unrolled()}
    return {**tree, "blocks": rest, "stack": stacked}


def to_layers(tree: Mapping[str, Any], layout: LayerLayout) -> dict[str, Any]:
    """Convert a stacked tree to a per-layer tree: the inverse of `to_stacked`."""
    if not layout.repeats:
        return dict(tree)
    blocks = dict(tree["blocks"])
    for position, stacked in tree["stack"].items():
        for repeat in range(layout.repeats):
            layer = layout.prefix + repeat * layout.period + int(position)
            blocks[str(layer)] = jax.tree.map(lambda leaf, r=repeat: leaf[r], stacked)
    ordered = {str(layer): blocks[str(layer)] for layer in range(layout.num_layers)}
    return {**{k: v for k, v in tree.items() if k != "stack"}, "blocks": ordered}
