"""The command line: accepted arguments, and one sentence for every other."""

import json
import subprocess
import sys
import threading

import pytest

from moe_jax.cli import exit as command_exit
from moe_jax.cli.commands import COMMANDS, Command, Flag, help_text
from moe_jax.cli.parse import parse as parse_line
from moe_jax.errors import UserError
from moe_jax.files.seals import sealed
from moe_jax.record.provenance import write_run_record

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg="plain"):
    train = {"steps": 5, "rate": 0.5, "fast": True, "name": "a"}
    return ConfigDict({"train": train, "arg": arg})
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return f"--config={path}"


def parse(*arguments, flags=(), **options):
    return parse_line(["prog", "--workdir=w", *arguments], Command("", tuple(flags), **options))


def test_values_and_overrides(config):
    parsed = parse(
        "--config.train.steps=7",  # before --config, which ml_collections alone refuses
        f"{config}:tiny",
        "--config.train.rate=1",
        "--noconfig.train.fast",
        "--config.train.name",
        "b",
        "--init_from=other",
        flags=[Flag("init_from", "", "weights"), Flag("runs", 20, "how many")],
    )
    assert parsed.overrides == {
        "train.steps": 7,
        "train.rate": 1.0,
        "train.fast": False,
        "train.name": "b",
    }
    assert parsed.config.arg == "tiny" and parsed.config.train.steps == 7
    assert parsed.config.train.rate == 1.0 and parsed.config.train.name == "b"
    assert (parsed.flags.workdir, parsed.flags.init_from, parsed.flags.runs) == ("w", "other", 20)


def test_one_parse_leaves_nothing_to_the_next(config):
    parse(config, "--config.train.steps=7")
    parsed = parse(config)
    assert parsed.config.train.steps == 5 and parsed.overrides == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.train.stepz=7"], r"config\.train\.stepz is not .*did you mean 'train.steps'"),
        (["--config.trian.steps=7"], r"config\.trian\.steps is not .*did you mean 'train.steps'"),
        (["--config.train.steps.more=7"], r"config\.train\.steps is a value"),
        (["--config.train.steps=ten"], r"--config\.train\.steps=ten .* of type int"),
        (["--config.train.steps=1.5"], r"--config\.train\.steps=1\.5 .* of type int"),
        (["--config.train.steps="], r"--config\.train\.steps= .* of type int"),
        (["--config.train.rate=x: y"], r"--config\.train\.rate=x.* of type float"),
        (["--config.train.fast=maybe"], r"--config\.train\.fast=maybe .* of type bool"),
        (["--config.train=3"], r"config\.train is a group of keys .*such as config\.train\.fast"),
        (["--config.train.steps"], r"Missing value for flag --config\.train\.steps"),
        (["--devises=3"], r"--devises is not a flag \(did you mean 'devices'"),
        (["--devices=x"], r"--devices=x .* of type int"),
        (["--devices=-1"], r"--devices=-1: give 1 to 65536"),
        (["train"], r"'train' is not a flag"),
        (["--workdir="], r"--workdir is missing"),
    ],
)
def test_mistakes_on_the_command_line(config, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        parse(config, *arguments)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1", r"defines no get_config\(\)"),
        ("def get_config(): return None", r"returns NoneType, not a ConfigDict"),
    ],
)
def test_mistakes_in_the_config_file(tmp_path, text, sentence):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=sentence):
        parse(f"--config={tmp_path / 'bad.py'}")


def test_config_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"--config=.*none\.py.* no file"):
        parse(f"--config={tmp_path / 'none.py'}")
    for arguments in ([], ["--config"], ["--config="]):
        with pytest.raises(UserError, match="--config is missing"):
            parse(*arguments)
    (tmp_path / "bare.py").write_text("def get_config(): pass")
    with pytest.raises(UserError, match="takes no argument"):
        parse(f"--config={tmp_path / 'bare.py'}:tiny")


def test_commands_without_config():
    assert parse(config=False).flags.workdir == "w"
    with pytest.raises(UserError, match="--config is not a flag"):
        parse("--config=x.py", config=False)
    assert parse_line(["prog"], Command("", config=False, workdir=False)).flags.workdir == ""


PROGRAM = """
import logging
import sys
import jax
from absl import logging as absl_logging
from moe_jax.errors import UserError
from moe_jax.cli.commands import COMMANDS, Command, Flag, help_text
from moe_jax.cli.exit import run
from moe_jax.cli.parse import parse

class Raises:
    def __init__(self, text):
        self.text = text

    def __del__(self):
        raise RuntimeError(self.text)

def logged(path, text):
    record = logging.LogRecord("absl", logging.ERROR, path, 1, text, (), None)
    absl_logging.get_absl_logger().handle(record)

def main(argv):
    parsed = parse(argv, Command("", (Flag("end", "", "how to end"),)))
    if parsed.flags.end == "noise":
        logged("/packages/orbax/checkpoint/futures.py", "told by orbax")
        logged("/packages/other/futures.py", "told by another")
        Raises("Event loop is closed")
        Raises("raised by another")
        return 0
    if parsed.flags.end == "user":
        raise UserError("Change the thing.")
    if parsed.flags.end == "bug":
        raise ZeroDivisionError("a bug")
    print(jax.devices()[0].platform, jax.device_count())
    return int(parsed.flags.end or 0)

run(main)
"""


def run_program(env, *arguments):
    command = [sys.executable, "-c", PROGRAM, "--workdir=w", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_devices_and_exit_codes(config, cli_env):
    done = run_program(cli_env, config, "--devices=3", "--end=42")
    assert (done.returncode, done.stdout, done.stderr) == (42, "cpu 3\n", "")


def test_a_mistake_is_one_line_and_a_bug_keeps_its_traceback(config, cli_env):
    done = run_program(cli_env, config, "--end=user")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "Error: Change the thing.\n")
    done = run_program(cli_env, config, "--end=bug")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: a bug\n")


def test_what_orbax_says_in_its_threads_is_not_shown(config, cli_env):
    done = run_program(cli_env, config, "--end=noise")
    assert done.returncode == 0
    assert "told by another" in done.stderr and "raised by another" in done.stderr
    assert "told by orbax" not in done.stderr and "Event loop" not in done.stderr


def test_run_record(tmp_path):
    folder = tmp_path / "run"
    write_run_record(str(folder), '{"seed": 1}\n', {"train.steps": 7}, "abc")
    for name, value in {"config": {"seed": 1}, "data": {"fingerprint": "abc"}}.items():
        written = json.loads((folder / f"{name}.json").read_text())
        assert written == sealed(value) != value
    assert json.loads((folder / "overrides.json").read_text()) == {"train.steps": 7}
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["packages"]["jax"] and versions["python"] and versions["device_count"] == 8
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*file.* cannot be written"):
        write_run_record(str(tmp_path / "file"), "{}", {}, "abc")


@pytest.mark.parametrize("error, traceback", [(OSError(28, "No space left"), 0), (KeyError(1), 1)])
def test_a_full_disk_in_a_librarys_thread_is_one_line(error, traceback, capsys):
    given = (type(error), error, error.__traceback__, threading.current_thread())
    command_exit._thread_failed(threading.ExceptHookArgs(given))
    text = capsys.readouterr().err
    assert str(error) in text and (len(text.splitlines()) > 1) == traceback


def test_options_of_a_named_transformation_are_flags_once_the_file_sets_them(tmp_path):
    path = tmp_path / "lion.py"
    path.write_text(
        "from moe_jax.config import default_config\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.optimizer.name = 'optax.scale_by_lion'\n"
        "    config.optimizer.options = {'b1': 0.9}\n"
        "    return config\n"
    )
    parsed = parse(f"--config={path}", "--config.optimizer.options.b1=0.8")
    assert parsed.config.optimizer.options.to_dict() == {"b1": 0.8}
    with pytest.raises(UserError, match=r"config\.optimizer\.options\.b2 is not a config key"):
        parse(f"--config={path}", "--config.optimizer.options.b2=0.8")


def test_help_lists_the_workdir_of_commands_that_make_use_of_one():
    listed = {name for name, one in COMMANDS.items() if "--workdir" in help_text(name, one)}
    assert set(COMMANDS) - listed == {"plan", "check"}
