"""Overrides of data.mixture on the command line, whose entries the config file may leave short."""

import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from moe_jax.data.config import MIXTURE_KEYS
from moe_jax.errors import UserError
from moe_jax.registry import lookup

_OVERRIDE = re.compile(r"--?config\.data\.mixture\.([^.=]+)\.([^.=]+)(?:=|$)")


def add_mixture_keys(config: ConfigDict, argv: Sequence[str]) -> None:
    """Gives `config` the entries and keys of data.mixture that `argv` sets.

    Flags exist for the keys of a config alone, and an entry may leave out those with a default; a
    new entry has none at all.

    Args:
      config: as the file made it; changed.
      argv: --config.data.mixture.NAME.KEY=VALUE among others.

    Raises:
      UserError: KEY is none of an entry's, or no flag can have NAME.
    """
    data = config.get("data")
    mixture = data.get("mixture") if isinstance(data, ConfigDict) else None
    if not isinstance(mixture, ConfigDict):
        return
    for name, key in (match.groups() for match in map(_OVERRIDE.match, argv) if match):
        default = lookup(MIXTURE_KEYS, key, f"config.data.mixture.{name} key")
        if not name.isidentifier():
            raise UserError(
                f"config.data.mixture.{name} has a name that no flag can have: set it in the "
                f"config file, or rename it there to letters, digits and _."
            )
        with config.unlocked(), config.ignore_type():
            if name not in mixture:
                mixture[name] = ConfigDict()
            entry = mixture[name]
            if isinstance(entry, ConfigDict):
                # A weight of 1 in the file does not make weights whole numbers.
                entry[key] = type(default)(entry.get(key, default))
