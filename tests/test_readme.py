"""The scripts, modules, configs and config keys in the README's commands exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """The command lines of the README's bash blocks, with continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def load_config(name: str) -> ConfigDict:
    """The config that `--config=name` loads; `name` is FILE or FILE:ARG."""
    path, _, arg = name.partition(":")
    spec = importlib.util.spec_from_file_location("config_of_readme", ROOT / path)
    assert spec is not None and spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg) if arg else module.get_config()


def named_configs() -> list[str]:
    """Every configs/x.py or configs/x.py:arg that the README mentions."""
    named = set(re.findall(r"configs/\w+\.py(?::\w+)?", README))
    for row in re.findall(r"^\| `(configs/\w+\.py).*?\|", README, re.MULTILINE):
        line = next(line for line in README.splitlines() if line.startswith(f"| `{row}"))
        named |= {f"{row}{arg}" for arg in re.findall(r"`(:\w+)`", line.split("|")[1])}
    return sorted(named)


def test_there_are_commands_to_check():
    assert {"bash launch/local.sh", "bash launch/test.sh"} <= {
        " ".join(shlex.split(line, comments=True)) for line in commands()
    }
    assert "configs/tiny.py:dense" in named_configs()


@pytest.mark.parametrize("line", commands())
def test_command_names_what_exists(line: str):
    words = shlex.split(line, comments=True)
    assert words[0] in ("bash", "python", "pip"), "teach this test the new command"
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    if words[:2] == ["python", "-m"]:
        module = words[2] if words[2].startswith("launch.") else f"{words[2]}.__main__"
        assert importlib.util.find_spec(module) is not None
    flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    if "config" in flags:
        config = load_config(flags["config"])
        for flag in flags:
            if flag.startswith("config."):
                assert flag.removeprefix("config.") in flatten(config)


def flatten(config: ConfigDict) -> set[str]:
    """The dotted names of all leaves."""
    return {
        f"{key}.{inner}" if inner else key
        for key, value in config.items()
        for inner in (flatten(value) if isinstance(value, ConfigDict) else {""})
    }


@pytest.mark.parametrize("name", named_configs())
def test_named_config_loads(name: str):
    assert "model" in load_config(name)


def test_every_config_is_in_the_table():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in files if f"`{name}" not in README} == set()


PATH = re.compile(r"(?<![\w/.-])(?:tests|moe_jax|launch|configs|benchmarks|docs)/[\w./-]*\w")
# Files that CONTRIBUTING.md tells the reader to write.
TO_BE_WRITTEN = {"moe_jax/moe/routers/my_router.py", "moe_jax/moe/dispatch/my_path.py"}


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name
)
def test_paths_that_a_page_names_exist(page: Path):
    """A page writes paths of tests in full, or this pattern would miss them."""
    text = page.read_text()
    named = set(PATH.findall(text)) - TO_BE_WRITTEN
    assert sorted(path for path in named if not (ROOT / path).exists()) == []
    assert re.findall(r"(?<![\w/])(?!tests/)\w+/test_\w+\.py", text) == []


def test_relative_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []
