"""The seal of a JSON object: the SHA-256 of all its other keys, under the key `sha256`.

It tells a flipped bit from what was written.  It proves nothing about who wrote it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moe_jax.files import records

SEAL = "sha256"


def seal_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object without its seal, whatever the order of its keys."""
    rest = {name: part for name, part in value.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its seal."""
    return {**value, SEAL: seal_of(value)}


def unsealed(value: Any) -> dict[str, Any]:
    """The object without its seal; one that has none, of an older version, as it is.

    Raises:
      ValueError: it is no object, or not what was written.
    """
    found = records.mapping(value)
    if SEAL in found and found[SEAL] != seal_of(found):
        raise ValueError("it differs from what was written (SHA-256)")
    return {name: part for name, part in found.items() if name != SEAL}
