"""Draws the load of each expert as a PNG, encoded with zlib.  L layers, E experts."""

import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

LOAD_MEANS = (
    "A row per MoE layer, the first on top, and a column per expert: assignments before any drop, "
    "over the balanced load. White: balanced; red: up to 4 times as much; blue: down to a quarter; "
    "black: none."
)
_RED, _BLUE = np.array([178, 24, 43]), np.array([33, 102, 172])
_DEEPEST = 2.0  # |log2(load / balanced load)| from which a colour is saturated
_WIDTH, _CELL = 1024, (4, 32)  # pixels: target width of the picture; minimum, maximum of a cell
_SAMPLED = ("kept", "dropped_capacity", "dropped_buffer")


class Picture(NamedTuple):
    """An encoded picture."""

    width: int  # pixels
    height: int
    png: bytes


def expert_load(row: Mapping[str, Any]) -> np.ndarray | None:
    """The assignments [L, E] before any drop in a row of ledger.jsonl; None for a dense model."""
    by_outcome = row.get("expert", {})
    counts = [
        np.asarray(by_outcome[outcome], float) for outcome in _SAMPLED if outcome in by_outcome
    ]
    return sum(counts[1:], counts[0]) if counts else None


def heat_map(load_LE: np.ndarray) -> Picture:
    """Colour each load relative to the balanced load of its layer, as LOAD_MEANS describes."""
    experts = load_LE.shape[1]
    mean_L1 = np.maximum(load_LE.mean(1, keepdims=True), 1e-9)
    depth_LE = np.log2(np.maximum(load_LE / mean_L1, 1e-9)) / _DEEPEST
    full_LE3 = np.where(depth_LE[..., None] > 0, _RED, _BLUE)
    share_LE1 = np.minimum(np.abs(depth_LE), 1)[..., None]
    colour_LE3 = np.where(load_LE[..., None] > 0, 255 + share_LE1 * (full_LE3 - 255), 0)
    cell = min(max(_WIDTH // experts, _CELL[0]), _CELL[1])
    pixels = colour_LE3.astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    return Picture(pixels.shape[1], pixels.shape[0], _png(pixels))


def _png(pixels: np.ndarray) -> bytes:
    """Encode 8-bit pixels [height, width, 3] as PNG (ISO/IEC 15948, sections 5 and 11)."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    lines = np.insert(pixels.reshape(height, -1), 0, 0, axis=1)  # filter byte 0: no filter
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
