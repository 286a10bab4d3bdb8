"""The seal of a JSON object: the SHA-256 of all its other keys, under the key `sha256`.

It detects corruption, such as a flipped bit.  It does not prove who wrote the object.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moe_jax.files import records

SEAL = "sha256"


def seal_of(value: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON object without its seal; the order of the keys does not matter."""
    rest = {name: part for name, part in value.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the object with its seal added."""
    return {**value, SEAL: seal_of(value)}


def unsealed(value: Any) -> dict[str, Any]:
    """Check the seal of a JSON object and return the object without it.

    Objects written by older versions have no seal and are returned as they are.

    Raises:
      ValueError: `value` is not an object, or its seal does not match.
    """
    found = records.mapping(value)
    if SEAL in found and found[SEAL] != seal_of(found):
        raise ValueError("it differs from what was written (SHA-256)")
    return {name: part for name, part in found.items() if name != SEAL}
