"""Tests docstring_rules.py: each kind of gap, planted alone in a sample, is found."""

import importlib.util
import sys

import docstring_rules
import pytest

SAMPLE = '''
import dataclasses
from typing import NamedTuple

from moe_jax.errors import UserError


def check(size):
    if size < 0:
        raise UserError("size")


def halved(size: int, axis: int | None = None) -> int:
    """Halve a size.

    Args:
      size: in tokens.
      axis: of a mesh; None: all.

    Returns:
      Tokens, at least 1.

    Raises:
      UserError: a negative size.

    Reference: Halving, arXiv 1234.56789.
    """
    check(size)


class Layer:
    """A layer of tokens.

    Args:
      size: in tokens.

    Raises:
      UserError: a negative size.
    """

    def __init__(self, size: int):
        check(size)

    def __call__(self, x_BTD):
        """Call it.

        Args:
          x_BTD: rows of T tokens.

        Returns:
          What it makes of them.
        """

    @property
    def width(self) -> int:
        """The width of a token."""

    @classmethod
    def named(cls, name: str) -> "Layer":
        """Make one by name.

        Args:
          name: any text.

        Returns:
          A layer of that name.
        """


@dataclasses.dataclass
class Knobs:
    """The knobs of a layer.

    Attributes:
      rows: in a group.

    Raises:
      UserError: negative rows.
    """

    rows: int = 1
    rate: float = 0.0  # per step; 0: off
    # Of a mesh axis; None: all.
    axis: str | None = None

    def __post_init__(self):
        check(self.rows)


class Pair(NamedTuple):
    """Two counts of tokens."""

    left: int  # of the first row
    right: int  # of the second row
'''


def sample_faults(folder, text):
    """The faults that the rules find in a module with this text."""
    (folder / "moe_jax_sample.py").write_text(text)
    spec = importlib.util.spec_from_file_location("moe_jax.sample", folder / "moe_jax_sample.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["moe_jax.sample"] = module
    docstring_rules.parsed.cache_clear()
    try:
        spec.loader.exec_module(module)
        found = list(docstring_rules.function_faults("halved", module.halved))
        found += docstring_rules.reference_faults("halved", module.halved)
        for cls in (module.Layer, module.Knobs, module.Pair):
            found += docstring_rules.class_faults(cls.__name__, cls)
    finally:
        del sys.modules["moe_jax.sample"]
    return found


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("", "", None),
        ("      size: in tokens.\n      axis", "      axis", "halved: size is not documented"),
        (
            "      size: in tokens.\n      axis",
            "      A size in tokens.\n      axis",
            "halved: size",
        ),
        ("in tokens.\n      axis", "\n      axis", "size is documented by less than two words"),
        ("mesh; None: all.\n\n    Ret", "mesh.\n\n    Ret", "axis does not say what None means"),
        ("axis: of a mesh;", "axes: of a mesh;", "halved has no parameter axes"),
        ("    Returns:\n      Tokens", "    Result:\n      Tokens", "halved has no Returns"),
        ("UserError: a neg", "ValueError: a neg", "halved has no Raises with UserError"),
        ("UserError: a negative size.", "UserError:", "halved has no Raises with UserError"),
        (", arXiv 1234.56789", "", "halved has no Reference"),
        ('"""Halve a size.', '"""', "halved has no sentence that says what it is"),
        ("      size: in tokens.\n\n", "      a layer\n\n", "Layer: size is not documented"),
        ("tokens.\n\n    Raises:", "tokens.\n\n    Errors:", "Layer has no Raises"),
        ("          x_BTD: rows", "          Rows", "Layer.__call__: x_BTD is not documented"),
        ("        Returns:\n          What", "          What", "Layer.__call__ has no Returns"),
        ('        """The width of a token."""', "        return 1", "Layer.width has no sentence"),
        ("          name: any", "          any", "Layer.named: name is not documented"),
        ("      rows: in a group.", "      lines: in a group.", "Knobs: rows is not documented"),
        ("      rows: in a group.", "      lines: in a group.", "Knobs has no field lines"),
        ("step; 0: off", "step", "Knobs: rate does not say what 0 means"),
        ("axis; None: all.\n    axis", "axis.\n    axis", "Knobs: axis does not say what None"),
        ("    # Of a mesh axis; None: all.\n", "", "Knobs: axis is not documented"),
        ("UserError: negative rows", "ValueError: rows", "Knobs has no Raises with UserError"),
        ("  # of the first row", "", "Pair: left is not documented"),
        ("  # of the second row", "  # number", "Pair: right is documented by less"),
    ],
)
def test_a_planted_gap_in_the_documentation_is_found(tmp_path, old, new, fault):
    """The sample has no fault; each change of it breaks one rule, which is reported."""
    assert old in SAMPLE
    found = sample_faults(tmp_path, SAMPLE.replace(old, new, 1) if old else SAMPLE)
    assert any(fault in one for one in found) if fault else found == []
