"""Overrides of data.mixture on the command line, also of keys that the config file leaves out."""

import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from moe_jax.data.config import MIXTURE_KEYS
from moe_jax.errors import UserError
from moe_jax.registry import lookup

_OVERRIDE = re.compile(r"--?config\.data\.mixture\.([^.=]+)\.([^.=]+)(?:=|$)")


def add_mixture_keys(config: ConfigDict, argv: Sequence[str]) -> None:
    """Add to `config` the entries and keys of data.mixture that `argv` sets.

    ml_collections defines flags only for keys that a config has, but an entry may leave out keys
    with a default, and a new entry has no keys.

    Args:
      config: the config of the file; changed in place.
      argv: the arguments, with any --config.data.mixture.NAME.KEY=VALUE.

    Raises:
      UserError: KEY is not a key of an entry, or NAME cannot be part of a flag.
    """
    data = config.get("data")
    mixture = data.get("mixture") if isinstance(data, ConfigDict) else None
    if not isinstance(mixture, ConfigDict):
        return
    for name, key in (match.groups() for match in map(_OVERRIDE.match, argv) if match):
        default = lookup(MIXTURE_KEYS, key, f"config.data.mixture.{name} key")
        if not name.isidentifier():
            raise UserError(
                f"config.data.mixture.{name} cannot be set by a flag: set it in the config file, "
                f"or rename it there to letters, digits and _."
            )
        with config.unlocked(), config.ignore_type():
            if name not in mixture:
                mixture[name] = ConfigDict()
            entry = mixture[name]
            if isinstance(entry, ConfigDict):
                # A weight of 1 in the file must not make the flag an integer flag.
                entry[key] = type(default)(entry.get(key, default))
