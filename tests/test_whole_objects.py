"""Checks the source: an object has all its attributes after `__init__`.

If an attribute is first assigned later, or only on some paths through `__init__`, readers and other
methods cannot know whether it exists.
"""

import ast
from pathlib import Path

import pytest
from test_layering import ROOT, sources


def stored(node: ast.AST) -> set[str]:
    """The names of attributes of `self` that are assigned somewhere in `node`."""
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }


def always_stored(body: list[ast.stmt]) -> set[str]:
    """The names that are assigned on every path through `body`."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.Return):
            break
        if isinstance(node, ast.If):
            found |= always_stored(node.body) & always_stored(node.orelse)
            if any(isinstance(part, ast.Return) for part in ast.walk(node)):
                break
        elif isinstance(node, ast.With | ast.Try):
            found |= always_stored(node.body)
        elif not isinstance(node, ast.For | ast.While):
            found |= stored(node)
    return found


def born_late(root: Path) -> list[str]:
    """One line per attribute that an object may lack after its `__init__`."""
    faults = []
    for module, path in sources(root).items():
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if not isinstance(node, ast.ClassDef):
                continue
            made = {target for part in node.body for target in declared(part)}
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    made |= always_stored(part.body)
            faults += [f"{module}:{node.name}.{name}" for name in sorted(stored(node) - made)]
    return faults


def declared(node: ast.stmt) -> set[str]:
    """The names that a statement in a class body declares: dataclass fields, defaults."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_objects_are_whole_after_init():
    assert born_late(ROOT) == []


@pytest.mark.parametrize(
    "text",
    [
        "def f(self): self.x = 1",
        "def __init__(self):\n    if a: self.x = 1",
        "def __init__(self):\n    if a: return\n    self.x = 1",
        "def __init__(self):\n    for a in b: self.x = a",
        "def __init__(self):\n    self.f()\n  def f(self): self.x = 1",
    ],
)
def test_a_planted_late_attribute_is_found(tmp_path, text):
    (tmp_path / "launch").mkdir()
    whole = (
        "class A:\n  def __init__(self):\n    self.x: int = 0\n  def f(self): self.x = 1\n"
        "class B:\n  x: int = 0\n  def f(self): self.x += 1\n"
        "class C:\n  def __init__(self):\n    if a: self.x = 1\n    else: self.x = 2\n"
        "class D:\n  def __init__(self):\n    with a: self.x, self.y = 1, 2\n"
    )
    (tmp_path / "launch" / "a.py").write_text(whole)
    assert born_late(tmp_path) == []
    (tmp_path / "launch" / "a.py").write_text(f"{whole}class E:\n  {text}\n")
    assert born_late(tmp_path) == ["launch.a:E.x"]
