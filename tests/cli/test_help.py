"""COMMAND --config=FILE --help lists the keys of that config, their values and meanings."""

import re

import pytest
from small_run import ROOT

from moe_jax.cli import commands
from moe_jax.cli.commands import COMMANDS, REGISTRATIONS, run_command
from moe_jax.errors import UserError
from moe_jax.moe.routers import ROUTERS

FILE = '''
import dataclasses
from typing import Annotated

import moe_jax
from moe_jax.bounds import within
from moe_jax.config import default_config


@dataclasses.dataclass(frozen=True)
class Sharp(moe_jax.LinearRouter):
    """Top-k of a softmax at a temperature."""

    top_k: int = 2
    temperature: Annotated[float, within("(0, 10]")] = 1.0  # divides the logits
    mute: bool = False

    @property
    def choices_per_token(self):
        return self.top_k


moe_jax.ROUTERS["sharp"] = Sharp


def get_config():
    config = default_config()
    config.model.moe.router = "sharp"
    config.train.steps = 7
    config.data.mixture = {"web": {"files": "w/*.txt", "weight": 3.0}}
    return config
'''
CONTROL = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    yield f"--config={tmp_path / 'own.py'}"
    ROUTERS.pop("sharp", None)


@pytest.fixture
def shown(monkeypatch, capsys):
    """Run a command line in this process up to the exit; return its output."""

    def ended(main, argv):
        main(argv)
        raise SystemExit(0)

    def show(*words: str) -> str:
        with pytest.raises(SystemExit):
            run_command(words[0], words[1:])
        return capsys.readouterr().out

    monkeypatch.setattr(commands, "_run", ended)
    monkeypatch.setattr("gc.freeze", lambda: None)  # its effect would outlast the test
    return show


TAKES = [name for name, one in COMMANDS.items() if one.config or REGISTRATIONS in one.flags]


@pytest.mark.parametrize("name", TAKES)
def test_every_command_that_takes_a_config(name, own, shown):
    text = shown(name, own, "--help")
    assert text.startswith(f"usage: python -m moe_jax {name} ")
    assert "  train.steps=7  (default 200)\n      int, 1 or more. Length of the run.\n" in text


def test_the_values_of_a_config_file_and_the_flags_beside_it(own, shown):
    text = shown("train", "-h", own, "--config.model.moe.options.sharp.temperature=0.5")
    assert not CONTROL.search(text)  # the output is not a terminal
    knob = "  model.moe.options.sharp.temperature=0.5  (default 1.0)\n"
    assert f"{knob}      float, in (0, 10]. Divides the logits.\n" in text
    assert "  model.moe.options.sharp.mute=False\n      bool.\n" in text
    assert "hash, soft, sharp. Which router" in text
    assert "  data.mixture={web}\n" in text
    assert "  data.mixture.web.weight=3.0  (default 1.0)\n" in text
    assert "  train.log_every=10\n" in text  # the value is the default
    assert ".NAME" not in text.split("Keys of")[1].replace("of the user", "")
    assert "data train-bpe" in shown("data", "train-bpe", own, "--help")


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_lines_fit_the_terminal(own, shown, monkeypatch, columns):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown("train", own, "--help")
    assert CONTROL.search(text)
    lines = CONTROL.sub("", text).split("Keys of")[1].splitlines()[1:]
    # A key and its value are never cut, so that they can be copied.
    wrapped = [line for line in lines if not re.match(r"  [\w.]+=", line)]
    assert len(wrapped) > 100 if columns < 110 else wrapped
    assert [line for line in wrapped if len(line) > columns] == []
    (steps,) = (line for line in lines if line.startswith("  train.steps="))
    beside = steps.endswith("int, 1 or more. Length of the run.")
    assert beside == (columns == 160)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--config=none.py"], "there is no file 'none.py'"),
        (["OWN", "--stepz=3"], r"--stepz is not a flag"),
        (["OWN", "--config.train.stepz=3"], r"did you mean 'train\.steps'"),
        (["OWN", "--config.train.steps=0"], r"^train\.steps is 0: set 1 or more\.$"),
        (["OWN", "more"], "'more' is not a flag"),
        (["--config"], "--config is missing"),
    ],
)
def test_a_mistake_beside_it_is_one_sentence(own, shown, words, sentence):
    with pytest.raises(UserError, match=sentence):
        shown("train", "--help", *(own if word == "OWN" else word for word in words))


def test_it_asks_for_no_device(run_cli, cli_env, monkeypatch):
    """Run the command line of a user, with devices that cannot be initialised."""
    monkeypatch.setitem(cli_env, "JAX_PLATFORMS", "nowhere")
    words = ["moe_jax", "train", f"--config={ROOT / 'configs' / 'tiny.py'}", "--help"]
    done = run_cli(words)
    assert (done.code, done.err) == (0, "") and "  train.steps=200\n" in done.out
    assert run_cli([*words, "--stepz=3"]).code == 1
