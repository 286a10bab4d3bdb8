"""Builds the typed configuration: ConfigDict -> frozen dataclasses, which validate themselves."""

import dataclasses
import hashlib
import json
import math
import pathlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from moe_jax import bounds
from moe_jax.bounds import Limit, one_of
from moe_jax.data.config import DataConfig
from moe_jax.decides import Data, Training
from moe_jax.errors import UserError
from moe_jax.files import json_files, seals
from moe_jax.model.config import ModelConfig
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS
from moe_jax.parallel.compile_cache import CompileCacheConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.registry import dotted_keys, lookup, own_fields, suggest_key, typed
from moe_jax.sections import (
    CheckpointConfig,
    EvalConfig,
    TrainConfig,
    WandbConfig,
    WatchdogConfig,
)
from moe_jax.train.optim import OptimizerConfig

MAX_NUMBER = 2**40  # maximum of an integer value in a config
PRECISIONS = ("float32", "bfloat16", "float64")
# Keys whose values are names in tables that the dataclass of the key cannot import.
TABLES: dict[str, Mapping[str, type]] = {
    "model.moe.router": ROUTERS,
    "model.moe.dispatch": DISPATCH,
}

SEED = Limit("between 0 and 2**32 - 1", lambda seed: 0 <= seed < 2**32, "set it")


class UnregisteredError(UserError):
    """The config names a router or dispatch path that this process has not registered."""


class _Renamed(NamedTuple):
    """The key that replaces a key of earlier versions."""

    key: str  # dotted, in the section of the old key
    means: str  # its meaning, for the message that refuses the old key
    value: Callable[[Any, Mapping[str, Any]], Any]  # (old value, whole saved config) -> new value


def _rows_of_batches(batches: Any, saved: Mapping[str, Any]) -> Any:
    """Rows in `batches` batches; a value that is not a number is returned for the type check."""
    train = saved.get("train")
    size = train.get("batch_size") if isinstance(train, Mapping) else None
    return batches * size if isinstance(batches, int) and isinstance(size, int) else batches


# A config file or flag with one of these keys is refused, and the message names the new key.  In a
# saved config of an earlier version (config.json, settings.jsonl) the key is replaced.
_RENAMED = {
    "eval.batches": _Renamed(
        "eval.rows",
        "held-out rows of an evaluation, independent of train.batch_size",
        _rows_of_batches,
    )
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of one run; every field has a default.

    Raises:
      UserError: the precision, router or dispatch path is unknown, or the seed is out of range.
    """

    # Seed of parameters, data order and noise; 0 is an ordinary seed.
    seed: Data[Annotated[int, SEED]] = 0
    # The compute dtype; float64 is for reference results on the CPU.
    precision: Training[Annotated[str, one_of(PRECISIONS)]] = "float32"
    mesh: MeshConfig = MeshConfig()  # how the devices share the work
    model: ModelConfig = ModelConfig()  # the shape of the Transformer
    data: DataConfig = DataConfig()  # text, tokenizer and rows
    optimizer: OptimizerConfig = OptimizerConfig()  # update rule and learning rate
    train: TrainConfig = TrainConfig()  # steps, batch, safeguards and logging
    eval: EvalConfig = EvalConfig()  # held-out loss and samples
    checkpoint: CheckpointConfig = CheckpointConfig()  # saving and retention
    watchdog: WatchdogConfig = WatchdogConfig()  # seconds until a run counts as hung
    # Compiled programs on disk, which the next start loads.
    compile_cache: CompileCacheConfig = CompileCacheConfig()
    wandb: WandbConfig = WandbConfig()  # Weights & Biases in addition to TensorBoard

    def __post_init__(self):
        bounds.check(self, "")
        if not self.model.dense:
            try:
                for key, table in TABLES.items():
                    lookup(table, getattr(self.model.moe, key.rpartition(".")[2]), key)
            except UserError as error:
                raise UnregisteredError(str(error)) from None


def default_config() -> ConfigDict:
    """A ConfigDict of every key with its default; the files under configs/ start from it."""
    config: Any = ConfigDict(to_dict(Config()))  # Any: pyright takes each attribute for Optional
    config.model.moe.options = ConfigDict(
        {name: {f.name: f.default for f in fields} for name, fields in option_fields().items()}
    )
    return config


def is_group(name: str) -> bool:
    """True if a dotted key names a group of keys of `Config`, such as `model.moe`."""
    hint: Any = Config
    for key in name.split("."):
        hint = typing.get_type_hints(hint).get(key) if dataclasses.is_dataclass(hint) else None
    return dataclasses.is_dataclass(hint)


def option_fields() -> dict[str, list[dataclasses.Field]]:
    """The options below `model.moe.options`: router or dispatch path -> its own fields."""
    shared = MoEConfig()
    found = {
        name: own_fields(cls, shared)
        for table in (ROUTERS, DISPATCH)
        for name, cls in table.items()
    }
    return {name: fields for name, fields in found.items() if fields}


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config dataclass to nested plain dicts of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_flat_dict(config: Any) -> dict[str, Any]:
    """The values of a config by dotted key, such as `model.moe.top_k`, without empty mappings."""
    return flatten_dict(to_dict(config), sep=".")


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Build the typed config; raises UserError for an unknown key, a wrong type or a bad value."""
    plain = plain_dict(config) if isinstance(config, ConfigDict) else config
    typed_config = _build(Config, plain, "")
    for name in typed_config.model.moe.options:
        lookup({**ROUTERS, **DISPATCH}, name, "model.moe.options")
    return typed_config


def plain_dict(config: ConfigDict) -> dict[str, Any]:
    """Convert the ConfigDict of a config file to nested plain dicts.

    The value of a `required_placeholder` is None.

    Raises:
      UserError: a key is not a string, or the config contains itself.
    """
    try:
        return {key: _plain_value(config, key) for key in config}
    except (TypeError, RecursionError) as error:
        raise UserError(
            f"The config is not a tree of named values ({error}): use strings as keys."
        ) from None


def _plain_value(config: ConfigDict, key: str) -> Any:
    try:
        value = config[key]
    except RequiredValueError:  # raised by config_dict.required_placeholder
        return None
    return plain_dict(value) if isinstance(value, ConfigDict) else value


def to_json(config: Config) -> str:
    """The resolved config as JSON text; `from_json` is its inverse."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def sealed_json(config: Config) -> str:
    """As `to_json`, with a seal (SHA-256) that `read_config` checks."""
    return json.dumps(seals.sealed(to_dict(config)), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> Config:
    """Parse a config written by `to_json` or `sealed_json`; the text is never executed."""
    try:
        plain = json_files.parse(text)
    except ValueError as error:
        raise UserError(f"The resolved config is not JSON ({error}).") from None
    return from_saved(plain)


def read_config(path: pathlib.Path | epath.Path) -> Config:
    """Read the config in a file that `to_json` or `sealed_json` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: as `config_of_record`.
    """
    return config_of_record(json_files.read(path), path)


def config_of_record(plain: Any, where: pathlib.Path | epath.Path | str) -> Config:
    """Parse a config that a run recorded; the record is never executed.

    Args:
      plain: the record, as `to_dict` gives it.
      where: place of the record, for error messages.

    Raises:
      UnregisteredError: the file that registers its router or dispatch path was not run here.
      UserError: the record is damaged, or of another version.
    """
    try:
        return from_saved(plain)
    except UnregisteredError as error:
        raise UnregisteredError(
            f"{where}: {str(error).rstrip('.')}: register it first: import the file that defines "
            f"it, or pass --config=FILE."
        ) from None
    except UserError as error:
        raise UserError(f"{where} is damaged or of another version: {error}") from None


def from_saved(plain: Any) -> Config:
    """Parse a config that this or an earlier version saved, as `to_dict` gives it.

    Raises:
      UserError: the config is damaged, or no version could have saved it.
    """
    try:
        plain = seals.unsealed(plain)
    except ValueError as error:
        raise UserError(f"The resolved config cannot be used: {error}.") from None
    for old, new in _RENAMED.items():
        section, _, key = old.partition(".")
        values = plain.get(section)
        if isinstance(values, Mapping) and key in values:
            rest = {name: value for name, value in values.items() if name != key}
            renamed = {new.key.rpartition(".")[2]: new.value(values[key], plain)}
            plain = plain | {section: renamed | rest}
    return _build(Config, plain, "")


def refuse_renamed(key: str) -> None:
    """Raise UserError for a dotted key that has been renamed since an earlier version."""
    if key in _RENAMED:
        new = _RENAMED[key]
        raise UserError(f"config.{key} is now config.{new.key} ({new.means}): set that instead.")


def fingerprint(config: Any) -> str:
    """The SHA-256 of a config dataclass's canonical JSON."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def _build(cls: type, plain: Mapping[str, Any], path: str) -> Any:
    """Build the dataclass `cls` from a mapping; keys and types are checked recursively."""
    hints = typing.get_type_hints(cls)
    unknown = set(plain) - set(hints)
    if unknown:
        key = sorted(map(str, unknown))[0]
        refuse_renamed(f"{path}{key}")
        near = suggest_key(f"{path}{key}", dotted_keys(default_config().to_dict()))
        raise UserError(f"config.{path}{key} is not a config key{near}.")
    return cls(**{key: _value(hints[key], value, f"{path}{key}") for key, value in plain.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against its annotation; an int is accepted for a float."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"config.{path} is {value!r}: it is a group of keys. Set its keys.")
        return _build(typing.cast(type, hint), value, f"{path}.")
    origin = typing.get_origin(hint) or hint
    if isinstance(origin, types.UnionType):
        raise TypeError(f"config field {path} has a union type; give it one type")
    _check_size(value, path)
    value = typed(hint, value, path)
    return {**value} if isinstance(value, Mapping) else value


def _check_size(value: Any, path: str) -> None:
    """Raise UserError for a float that is not finite, or an int beyond LARGEST."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(part, Mapping | str | int | float | list | tuple | None):
                raise UserError(
                    f"config.{path}.{key} is {part!r} ({type(part).__name__}): give a string, a "
                    f"number, true or false."
                )
            _check_size(part, f"{path}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{path} is {value}: give a finite number.")
    elif isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise UserError(f"config.{path} is {value}: give a number of at most {MAX_NUMBER}.")
