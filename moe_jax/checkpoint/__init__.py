"""Saves checkpoints, and verifies them before they are loaded.

WORKDIR/checkpoints/<step>/ holds Orbax's files and manifest.json.  A step that does not verify is
moved to WORKDIR/checkpoints/quarantine/.
"""

from moe_jax.checkpoint.folder import QUARANTINE
from moe_jax.checkpoint.store import Checkpoints
from moe_jax.checkpoint.tree import array_digest, check_disk, disk_needed, named_leaves

__all__ = [
    "QUARANTINE",
    "Checkpoints",
    "array_digest",
    "check_disk",
    "disk_needed",
    "named_leaves",
]
