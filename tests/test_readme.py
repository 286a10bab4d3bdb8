"""What the pages tell a person to type exists: scripts, modules, configs, config keys, links."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text()
# Pages of docs/log/ are not edited later, so what they name may be gone.
LIVING = [page for page in PAGES if page.parent.name != "log"]
# The pages whose commands a reader types one after the other, in this order.
IN_ORDER = ("README.md", "docs/commands.md", "docs/sweeps.md", "docs/cluster.md")


def commands(page: str) -> list[str]:
    """The command lines of a page's bash blocks, continued lines joined.

    Lines without a command are left out: comments, and flags alone, which continue another command.
    """
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [(line, shlex.split(line, comments=True)) for line in lines]
    return [line for line, given in words if given and not given[0].startswith("--")]


def typed_in_order() -> list[str]:
    """The commands of all pages of IN_ORDER."""
    return [line for page in IN_ORDER for line in commands(page)]


ALL_COMMANDS = [line for page in LIVING for line in commands(str(page.relative_to(ROOT)))]


def load_config(name: str) -> ConfigDict:
    """The config that `--config=name` loads; `name` is FILE or FILE:ARG."""
    path, _, arg = name.partition(":")
    spec = importlib.util.spec_from_file_location("config_of_readme", ROOT / path)
    assert spec is not None and spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg) if arg else module.get_config()


CONFIGS = (ROOT / "docs/configs.md").read_text()


def named_configs() -> list[str]:
    """Every configs/x.py or configs/x.py:arg that the README or the table of configs mentions."""
    named = set(re.findall(r"configs/\w+\.py(?::\w+)?", README + CONFIGS))
    for row in re.findall(r"^\| `(configs/\w+\.py).*?\|", CONFIGS, re.MULTILINE):
        line = next(line for line in CONFIGS.splitlines() if line.startswith(f"| `{row}"))
        named |= {f"{row}{arg}" for arg in re.findall(r"`(:\w+)`", line.split("|")[1])}
    return sorted(named)


def test_there_are_commands_to_check():
    assert {"bash launch/local.sh", "bash launch/test.sh"} <= {
        " ".join(shlex.split(line, comments=True)) for line in commands("README.md")
    }
    assert all(commands(page) for page in IN_ORDER)
    assert "configs/tiny.py:dense" in named_configs()


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_command_names_what_exists(line: str):
    words = shlex.split(line, comments=True)
    assert words[0] in ("bash", "python", "pip"), "teach this test the new command"
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    if words[:2] == ["python", "-m"]:
        assert_module_runs(words[2])
    flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    if "config" in flags:
        config = load_config(flags["config"])
        for flag in flags:
            if flag.startswith("config."):
                assert flag.removeprefix("config.") in flatten(config)


def assert_module_runs(module: str) -> None:
    """`python -m MODULE` has a file to run."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    if spec.submodule_search_locations is not None:  # a package runs its __main__
        assert importlib.util.find_spec(f"{module}.__main__") is not None, module


@pytest.mark.parametrize("page", LIVING, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_scripts_that_a_page_runs_exist(page: Path):
    """Commands in running text, tables and indented blocks, too."""
    text = page.read_text()
    for module in set(re.findall(r"python3? -m ((?:moe_jax|launch|benchmarks)[\w.]*\w)", text)):
        assert_module_runs(module)
    for script in set(re.findall(r"python3? ([\w/]+\.py)", text)):
        assert (ROOT / script).is_file(), script


def flatten(config: ConfigDict) -> set[str]:
    """Dotted names of all leaves."""
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
    assert {name for name in files if f"`{name}" not in CONFIGS} == set()


PATH = re.compile(r"(?<![\w/.-])(?:tests|moe_jax|launch|configs|benchmarks|docs)/[\w./-]*\w")
# What CONTRIBUTING.md asks a person to write.
TO_BE_WRITTEN = {
    "moe_jax/moe/routers/my_router.py",
    "moe_jax/moe/dispatch/my_path.py",
    "docs/log/YYYY-MM-DD-topic.md",
}


@pytest.mark.parametrize("page", LIVING, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_that_a_page_names_exist(page: Path):
    """A path of tests is written in full, so that it is found by this pattern."""
    text = page.read_text()
    named = set(PATH.findall(text)) - TO_BE_WRITTEN
    assert sorted(path for path in named if not (ROOT / path).exists()) == []
    assert re.findall(r"(?<![\w/])(?!tests/)\w+/test_\w+\.py", text) == []


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings; lines of code blocks are no headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_readme_stays_short():
    assert len(README.splitlines()) <= 150


def test_index_names_every_page():
    index = (ROOT / "docs/README.md").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert {page for page in pages - {"README.md"} if f"({page})" not in index} == set()


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: str(page.relative_to(ROOT))
)
def test_a_page_opens_with_what_the_reader_can_do_after_it(page: Path):
    paragraph = page.read_text().split("\n\n")[1]
    assert paragraph.startswith("After this page you ")
