"""Checks the source: the order of imports, unsafe calls, lengths of files and functions.

The table RANKS is the order that ARCHITECTURE.md describes.  An entry is a folder, or a module of a
folder that has an order inside.  A module belongs to the entry with the longest matching name.  It
may import its own entry and entries of a lower rank; entries of equal rank must not import each
other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

RANKS = {
    "moe_jax.errors": 0,
    "moe_jax.version": 0,
    "moe_jax.decides": 0,
    "moe_jax.field_comments": 0,
    "moe_jax.files": 1,
    "moe_jax.registry": 1,
    "moe_jax.bounds": 1.5,
    "moe_jax.data.batch": 1,  # the names of a batch's arrays
    "moe_jax.parallel": 2,
    "moe_jax.ops": 3,
    "moe_jax.nn": 4,
    "moe_jax.moe.config": 5.0,
    "moe_jax.moe.dispatch_types": 5.05,
    "moe_jax.moe.types": 5.1,
    "moe_jax.moe.balance": 5.2,
    "moe_jax.moe.groups": 5.2,
    "moe_jax.moe.accounting": 5.2,
    "moe_jax.moe.noise": 5.2,
    "moe_jax.moe.routers": 5.3,
    "moe_jax.moe.dispatch": 5.3,
    "moe_jax.moe.experts": 5.3,
    "moe_jax.moe.components": 5.4,
    "moe_jax.moe.call": 5.4,
    "moe_jax.moe.layer": 5.5,
    "moe_jax.moe.study": 5.5,
    "moe_jax.model": 6,
    "moe_jax.data": 6,
    "moe_jax.checkpoint": 6,
    "moe_jax.train": 7,
    "moe_jax.eval": 7,
    "moe_jax.sections": 7,
    "moe_jax.config": 8,
    "moe_jax.config_file": 8.5,
    "moe_jax.keys": 8.5,
    "moe_jax.pretrained": 9,
    "moe_jax.watch": 9,
    "moe_jax.record": 9,
    "moe_jax.run": 10,
    "moe_jax.tools.hlo": 11.0,
    "moe_jax.tools.plan": 11.1,
    "moe_jax.tools.bench": 11.1,
    "moe_jax.tools.goodput": 11.1,
    "moe_jax.tools.ledger": 11.1,
    "moe_jax.tools.replay": 11.1,
    "moe_jax.tools.results": 11.1,
    "moe_jax.tools.doctor": 11.2,  # asks the plan for its estimate
    "moe_jax.cli": 12,
    "moe_jax": 13,  # only __init__.py, which exports
    "moe_jax.__main__": 13,
    "moe_jax.train.__main__": 13,  # the older form of `python -m moe_jax train`
}
# Folders whose modules have one entry each; the __init__.py of these folders is empty.
SPLIT = ("moe_jax.moe", "moe_jax.tools")
# Pairs that must not import each other although their ranks allow it.
FORBIDDEN = {
    (low, high)
    for low in ("moe_jax.data", "moe_jax.checkpoint")
    for high in ("moe_jax.nn", "moe_jax.moe", "moe_jax.model")
}
# A launcher runs on machines that may not have JAX.
LAUNCH_MAY_IMPORT = (
    "moe_jax.errors",
    "moe_jax.files.links",
    "moe_jax.files.python_file",
    "moe_jax.registry",
)

# These could run code from a file or a config, or let a shell parse a command made from it.
# np.load may unpickle, and allocates any shape that a file declares.
NEVER_IMPORTED = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
}
NEVER_CALLED = {"eval", "exec", "os.system", "os.popen", "__import__"}
NEVER_CALLED |= {
    "np.load",
    "numpy.load",
    "jnp.load",
    "torch.load",
    "yaml.load",
    "pandas.read_pickle",
}
NEVER_TRUE = {"shell", "allow_pickle"}

FILE_LINES = 400
FUNCTION_LINES = 80
# path or path:function -> the reason for its length.
LONGER: dict[str, str] = {}


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file, for moe_jax, configs and launch."""
    found = {}
    for top in ("moe_jax", "configs", "launch"):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module name) of every import, also inside functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:  # `from package import name`: a module, or a name inside it
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known else base


def layer(module: str) -> str | None:
    """The entry of RANKS that `module` belongs to; None: it has no entry."""
    name = module
    while name and name not in RANKS:
        name = name.rpartition(".")[0]
    return None if name == "moe_jax" != module else name or None


def layering_faults(root: Path) -> list[str]:
    """One line per import that violates the order."""
    known, faults = sources(root), []
    for module, path in known.items():
        top, here = module.partition(".")[0], layer(module)
        if top == "moe_jax" and here is None and module not in SPLIT:
            faults.append(f"{module} has no place in RANKS")
            continue
        for line, target in imports(module, path, known):
            where, there = f"{module}:{line} imports {target}", layer(target)
            target_top = target.partition(".")[0]
            if top == "launch" and (
                target_top in ("jax", "flax")
                or (target_top == "moe_jax" and target not in LAUNCH_MAY_IMPORT)
            ):
                faults.append(where)
            if top != "moe_jax":
                continue
            if target_top in ("configs", "launch"):
                faults.append(where)
            if target_top != "moe_jax" or here == there or there is None:
                continue
            if RANKS[here] <= RANKS[there] or any(
                here.startswith(low) and there.startswith(high) for low, high in FORBIDDEN
            ):
                faults.append(where)
    return faults


def dotted(node: ast.expr) -> str:
    """The text of a dotted name, such as "os.system"; "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def unsafe_faults(root: Path) -> list[str]:
    """One line per import or call that could run code from a file or a flag."""
    faults = []
    known = sources(root) | {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in sorted((root / "benchmarks").rglob("*.py"))
    }
    for module, path in known.items():
        for line, target in imports(module, path, known):
            if target.partition(".")[0] in NEVER_IMPORTED:
                faults.append(f"{module}:{line} imports {target}")
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if not isinstance(node, ast.Call):
                continue
            if dotted(node.func) in NEVER_CALLED:
                faults.append(f"{module}:{node.lineno} calls {dotted(node.func)}")
            for keyword in node.keywords:
                value = keyword.value
                off = isinstance(value, ast.Constant) and value.value in (False, None)
                if keyword.arg in NEVER_TRUE and not off:
                    faults.append(f"{module}:{node.lineno} sets {keyword.arg}")
    return faults


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length_faults(root: Path) -> list[str]:
    """One line per file with FILE_LINES or more, and per function with FUNCTION_LINES or more."""
    faults = []
    for path in [*sources(root).values(), *sorted((root / "tests").rglob("*.py"))]:
        name = str(path.relative_to(root))
        lines = len(path.read_text().splitlines())
        if lines >= FILE_LINES and name not in LONGER:
            faults.append(f"{name} has {lines} lines")
        for function in functions(path):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines >= FUNCTION_LINES and f"{name}:{function.name}" not in LONGER:
                faults.append(f"{name}:{function.name} has {lines} lines")
    return faults


def test_imports_follow_the_order():
    assert layering_faults(ROOT) == []


def test_the_table_names_only_what_exists():
    assert [name for name in (*RANKS, *SPLIT) if name not in sources(ROOT)] == []


def test_nothing_runs_what_a_file_says():
    assert unsafe_faults(ROOT) == []


def test_files_and_functions_are_short():
    assert length_faults(ROOT) == []


def test_exactly_one_train_step():
    places = [
        f"{module}:{function.lineno}"
        for module, path in sources(ROOT).items()
        for function in functions(path)
        if function.name == "train_step"
    ]
    assert len(places) == 1 and places[0].startswith("moe_jax.train.step:"), places


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("moe_jax/ops/a.py", "import moe_jax.model.block", "imports moe_jax.model.block"),
        ("moe_jax/moe/routers/a.py", "from moe_jax.moe.dispatch import x", "dispatch"),
        ("moe_jax/moe/dispatch/a.py", "def f():\n  from ..experts import x", "moe.experts"),
        ("moe_jax/data/a.py", "from moe_jax.model import config", "imports moe_jax.model"),
        ("moe_jax/model/block.py", "from moe_jax.train import losses", "moe_jax.train.losses"),
        ("moe_jax/nn/a.py", "from moe_jax.model.config import x", "imports moe_jax.model.config"),
        ("moe_jax/train/a.py", "from moe_jax.config import x", "imports moe_jax.config"),
        ("moe_jax/watch/a.py", "from moe_jax.record import x", "imports moe_jax.record"),
        ("moe_jax/run/a.py", "from moe_jax import __version__", "imports moe_jax"),
        ("moe_jax/train/a.py", "from configs import tiny", "imports configs"),
        ("launch/sweep.py", "import moe_jax.run.loop", "imports moe_jax.run.loop"),
        ("launch/slurm.py", "import jax", "imports jax"),
        ("moe_jax/brand_new.py", "", "has no place"),
    ],
)
def test_a_planted_import_is_found(tmp_path, file, text, fault):
    """Each kind of wrong import, planted alone in a small tree, is reported."""
    for name in (file, "moe_jax/train/losses.py", "moe_jax/model/config.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert layering_faults(tmp_path) == [] or fault == "has no place"
    (tmp_path / file).write_text(text)
    (found,) = layering_faults(tmp_path)
    assert fault in found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "x = eval('1')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "np.fromfile('a.npy', allow_pickle=True)",
        "np.load('a.npy', allow_pickle=False)",
        "import shelve",
        "import marshal as m",
        "yaml.load(text)",
        "torch.load('a.pt')",
    ],
)
def test_a_planted_unsafe_call_is_found(tmp_path, text):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "a.py").write_text("subprocess.run(['ls'], shell=False)\nmodel.eval()\n")
    assert unsafe_faults(tmp_path) == []
    (tmp_path / "launch" / "a.py").write_text(text)
    assert len(unsafe_faults(tmp_path)) == 1


def test_a_planted_long_function_is_found(tmp_path):
    (tmp_path / "tests").mkdir()
    body = "def f():\n" + "    pass\n" * (FUNCTION_LINES - 2)
    (tmp_path / "tests" / "a.py").write_text(body)
    assert length_faults(tmp_path) == []
    (tmp_path / "tests" / "a.py").write_text(body + "    pass\n")
    assert length_faults(tmp_path) == [f"tests/a.py:f has {FUNCTION_LINES} lines"]
    (tmp_path / "tests" / "a.py").write_text("x = 1\n" * FILE_LINES)
    assert length_faults(tmp_path) == [f"tests/a.py has {FILE_LINES} lines"]
