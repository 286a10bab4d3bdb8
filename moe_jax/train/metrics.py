"""Turns the device metrics of a step into the row that is logged.

L MoE layers, E experts, N entries of a ledger axis (experts, positions or sources).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.moe.types import MoEAux

# A layer's router has collapsed if its `effective_share` stays below this.  Layers of Switch (64
# experts, one H200) that learned stayed above 0.3; the one that collapsed, at 0.05 to 0.11.
COLLAPSED = 0.15


def effective_share(effective: float, experts: int, choices: int) -> float:
    """The share of the way from K effective experts (all tokens choose the same K) to E (balanced).

    Args:
      effective: exp of the entropy of the load, in experts.
      experts: E.
      choices: K; K = E: the load is always balanced, so the share is 1.
    """
    return (effective - choices) / (experts - choices) if choices < experts else 1.0


def load_summary(load_LE: np.ndarray) -> dict[str, list[float]]:
    """Summarise the load of each layer, from assignments per expert [L, E] before any drop."""
    mean_L = np.maximum(load_LE.mean(1), 1e-9)
    share_LE = load_LE / np.maximum(load_LE.sum(1, keepdims=True), 1)
    entropy_L = -(share_LE * np.log(np.maximum(share_LE, 1e-30))).sum(1)
    return {
        "load_max_over_mean": (load_LE.max(1) / mean_L).tolist(),
        "load_min_over_mean": (load_LE.min(1) / mean_L).tolist(),
        "load_cv": (load_LE.std(1) / mean_L).tolist(),
        "effective_experts": np.exp(entropy_L).tolist(),
        "dead_experts": (load_LE == 0).sum(1).tolist(),
    }


def ledger_row(moe: MoEAux | None, sources: Sequence[str]) -> dict[str, Any]:
    """Make a ledger row: counts [L, N] of each outcome by expert, position and source.

    Outcomes that did not occur are left out.
    """
    if moe is None:
        return {}
    return {
        "sources": list(sources),
        "assignments": np.asarray(moe.stats.assignments).tolist(),
        **{
            axis: {
                outcome: np.asarray(count_LN).tolist()
                for outcome, count_LN in outcomes._asdict().items()
                if np.any(count_LN)
            }
            for axis, outcomes in moe.ledger._asdict().items()
        },
    }


def moe_row(moe: MoEAux | None) -> dict[str, Any]:
    """Make the MoE part of a row: totals over layers, and per-layer lists under `layers`.

    Args:
      moe: NumPy arrays with a leading axis over MoE layers; None: a dense model, with zeros.
    """
    if moe is None:
        zeros = dict.fromkeys(("assignments", "kept", "dropped", "unsampled", "padding"), 0)
        rest = {"drop_fraction": 0.0, "load_max_over_mean": 1.0, "load_violation": 0.0}
        rest |= {"dead_experts": 0, "kept_weight": 0.0}
        return {**zeros, **rest, "router_entropy": 0.0, "layers": {}}
    stats, outcomes = moe.stats, moe.stats.outcomes
    total = {name: int(np.sum(value, dtype=np.int64)) for name, value in outcomes._asdict().items()}
    assignments = int(np.sum(stats.assignments, dtype=np.int64))
    dropped = total["dropped_capacity"] + total["dropped_buffer"]
    sampled_L = np.maximum(outcomes.sampled(), 1)
    dropped_L = outcomes.sampled() - outcomes.kept
    layers = load_summary(np.asarray(moe.load_E, np.float64))
    router_L = {
        "balance_loss": moe.router.balance,
        "z_loss": moe.router.z,
        "router_entropy": moe.router.entropy,
    }
    layers |= {
        name: (mean.sum / np.maximum(mean.count, 1)).tolist() for name, mean in router_L.items()
    }
    layers |= {
        "drop_fraction": (dropped_L / sampled_L).tolist(),
        "dropped_capacity": outcomes.dropped_capacity.tolist(),
        "dropped_buffer": outcomes.dropped_buffer.tolist(),
        "lost_tokens": stats.lost_tokens.tolist(),
        "kept_weight": (stats.kept_weight_sum / np.maximum(outcomes.kept, 1)).tolist(),
    }
    if moe.scale is not None:
        layers["branch_over_residual"] = np.sqrt(
            moe.scale.branch / np.maximum(moe.scale.residual, 1e-30)
        ).tolist()
    return {
        "assignments": assignments,
        **total,
        "dropped": dropped,
        "unaccounted": assignments - sum(total.values()),  # conserved: 0
        "lost_tokens": int(np.sum(stats.lost_tokens, dtype=np.int64)),
        "drop_fraction": dropped / max(1, int(sampled_L.sum())),
        "load_max_over_mean": max(layers["load_max_over_mean"]),
        "load_violation": max(layers["load_max_over_mean"]) - 1,
        "kept_weight": float(np.sum(stats.kept_weight_sum)) / max(1, total["kept"]),
        "dead_experts": int(sum(layers["dead_experts"])),
        "router_entropy": float(np.mean(layers["router_entropy"])),
        "layers": layers,
    }
