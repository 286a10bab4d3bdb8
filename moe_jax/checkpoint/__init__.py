"""Checkpoints that are verified before they are trusted.

WORKDIR/checkpoints/<step>/ holds what Orbax writes and manifest.json; a step that does not verify
is moved to WORKDIR/checkpoints/quarantine/.
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
