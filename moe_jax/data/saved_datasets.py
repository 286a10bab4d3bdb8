"""Finds the files of Hugging Face datasets: saved by `save_to_disk`, or named on the hub.

Both are Arrow files, which `columnar.read_arrow` reads.  The library itself only resolves names
of the hub; version 4 and later run no code of a dataset.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files import json_files, records

STATE = "state.json"  # lists the files of a saved dataset
_SPLITS = "dataset_dict.json"  # lists the folders of a saved DatasetDict
_NAME = re.compile(r"hf://((?:[\w.-]+/)?[\w.-]+)((?::[\w.-]+){0,2})", re.ASCII)
_FIRST_WITHOUT_SCRIPTS = 4


def is_hub_name(entry: str) -> bool:
    """True if an entry of `files` is hf://OWNER/NAME, with or without :SPLIT or :CONFIG:SPLIT."""
    return _NAME.fullmatch(entry) is not None


def hub_files(entry: str, key: str) -> list[epath.Path]:
    """Find the files of a split of the hub; download them unless the library has cached them.

    Args:
      entry: as `is_hub_name` describes it.
      key: config key, for errors.

    Raises:
      UserError: no split is named, the library is missing, or the hub cannot provide the split.
    """
    match = _NAME.fullmatch(entry)
    assert match
    name, parts = match[1], match[2].split(":")[1:]
    with _asking(entry, key):
        datasets = _library()
        config = parts[0] if len(parts) == 2 else None
        if not parts:
            splits = datasets.get_dataset_split_names(name)
            raise UserError(
                f"{key}: {entry} has the splits {', '.join(splits)}: name one, such as "
                f"{entry}:{splits[0]}."
            )
        # Only the names of its files are used: `columnar.read_arrow` reads the rows.
        found = datasets.load_dataset(name, config, split=parts[-1], keep_in_memory=False)
    files = [epath.Path(part["filename"]) for part in found.cache_files]
    if not files:
        raise UserError(f"{key}: {entry} has no rows: name another split.")
    return files


def saved_files(folder: epath.Path, key: str) -> list[epath.Path] | None:
    """Find the files of a saved dataset, in order; None: the folder does not hold one.

    Raises:
      UserError: the folder holds several splits, or does not say which files the dataset has.
    """
    if (folder / _SPLITS).exists():
        splits = _names(folder / _SPLITS, "splits")
        such = f", such as {folder / splits[0]}" if splits else ""
        raise UserError(
            f"{key}: {folder} is a dataset with the splits {', '.join(splits)}: name one{such}."
        )
    if not (folder / STATE).exists():
        return None
    return [folder / name for name in _names(folder / STATE, "_data_files")]


def _names(path: epath.Path, key: str) -> list[str]:
    """The names listed in a file of a saved dataset; the file is not trusted."""
    try:
        found = records.items(records.mapping(json_files.load(path)).get(key))
        plain = [records.text(one["filename"] if isinstance(one, dict) else one) for one in found]
        if not all(re.fullmatch(r"[^/\\\0]+", name) and name not in (".", "..") for name in plain):
            raise ValueError("it names files of other folders")
        return plain
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} does not say which files the dataset has ({error}): save it again."
        ) from None


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Names of the Hugging Face hub need its library: install the extra, "
            "pip install 'moe_jax[hf]'."
        ) from None
    if int(datasets.__version__.split(".")[0]) < _FIRST_WITHOUT_SCRIPTS:
        raise UserError(
            f"datasets {datasets.__version__} may run code that comes with a dataset: "
            f"pip install 'datasets>={_FIRST_WITHOUT_SCRIPTS}'."
        )
    return datasets


@contextlib.contextmanager
def _asking(entry: str, key: str) -> Iterator[None]:
    """Turn every error of the library, which has dozens of kinds, into one sentence."""
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.ERROR)  # it warns about each attempt
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise UserError(
            f"{key}: {entry} cannot be loaded from the Hugging Face hub ({why}): check its name, "
            f"its split and the network, or name a folder that save_to_disk wrote."
        ) from None
    finally:
        hub.setLevel(before)
