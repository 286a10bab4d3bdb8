"""The checks of a run that come before any data is read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.cli.check import check, main
from moe_jax.config import from_config_dict, to_json
from moe_jax.config_file import read_config_file
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS
from moe_jax.run.resolve import resolve
from moe_jax.run.setup import resolve_config

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"problem": None, "finished": False, "changed": []}
SHORT = ("--config.train.steps=8", "--config.optimizer.warmup_steps=2")


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config=configs/tiny.py", "--config.train.stepz=8"], "did you mean 'train.steps'"),
        (["--config=configs/tiny.py", "--config.train.steps=x"], "give a value of type int"),
        (["--config=configs/tiny.py", "--config.train.steps=8"], "would not reach its peak"),
        (["--config=configs/tiny.py", "--config.mesh.expert=4"], "does not multiply to the 2"),
        (
            [
                "--config=configs/tiny.py",
                "--config.mesh.tensor=2",
                "--config.model.moe.expert_width=33",
            ],
            "expert_mlp = 33, which mesh tensor (2) does not divide",
        ),
        (["--config=configs/tiny.py", "--config.model.moe.router=expert_choice"], "see the future"),
        (["--config=configs/tiny.py", "--config.model.moe.priority=batch"], "Set priority token"),
        (["--config=configs/tiny.py:moe"], "takes the argument 'dense' or none"),
        (["--config=configs/missing.py"], "there is no file"),
        (["--config=broken.py"], "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_found(place, arguments, sentence):
    (place / "broken.py").write_text("def get_config(): return 1 / 0")
    answer = check([*arguments, "--workdir=none"], num_devices=2)
    assert answer["problem"] and sentence in answer["problem"] and not answer["finished"]


def test_the_check_knows_what_a_resumed_run_keeps(place):
    """A new seed in a workdir with a checkpoint is refused, as in the trainer."""
    workdir = place / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    config = resolve(from_config_dict(read_config_file("configs/tiny.py")), 1, 258).config
    (workdir / "config.json").write_text(to_json(config))
    flags = ["--config=configs/tiny.py", f"--workdir={workdir}"]
    assert check(flags, 1)["problem"] is None
    problem = check([*flags, "--config.seed=1"], 1)["problem"]
    assert "config.seed is 1 but the run in this workdir has 0" in problem


def test_a_router_that_a_resumed_run_turns_is_named(place):
    """The shapes agree, so no other check would find the change."""
    (place / "run" / "checkpoints").mkdir(parents=True)
    config = read_config_file("configs/tiny.py")
    resolved = resolve(from_config_dict(config), 1, 258).config
    (place / "run" / "config.json").write_text(to_json(resolved))
    assert resolve_config(from_config_dict(config), place / "run", 1).notes == []
    config.model.moe.options.top_k.renormalize = False
    assert resolve_config(from_config_dict(config), place / "run", 1).notes == [
        "model.moe.options.top_k.renormalize was True, is False"
    ]


def test_finished_is_the_last_evaluation_of_these_steps(place):
    flags = ["--config=configs/tiny.py", "--workdir=run", *SHORT]
    assert check(flags, 1) == GOOD
    (place / "run").mkdir()
    rows = [{"step": 4, "eval_loss": 2.0}, {"step": 8, "loss": 2.0}]
    metrics = place / "run" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not check(flags, 1)["finished"]
    with metrics.open("a") as file:
        file.write('{"step": 8, "eval_loss": 1.5}\n')
    assert check(flags, 1)["finished"]
    assert not check([*flags, "--config.train.steps=9"], 1)["finished"]
    assert not (place / "run" / "lock").exists()


def test_a_run_whose_text_was_used_up_is_finished(place):
    """It is finished as long as data.max_epochs does not allow more epochs."""
    (place / "run").mkdir()
    metrics = place / "run" / "metrics.jsonl"
    metrics.write_text('{"step": 4, "eval_loss": 2.0}\n')
    flags = ["--config=configs/tiny.py", "--workdir=run", *SHORT]
    twice = "--config.data.max_epochs=2"
    assert not check([*flags, twice], 1)["finished"]
    with metrics.open("a") as file:
        file.write('{"step": 5, "max_epochs": 2, "eval_loss": 1.5}\n')
    assert check([*flags, twice], 1)["finished"]
    assert check([*flags, "--config.train.steps=9", twice], 1)["finished"]
    for other in ([], ["--config.data.max_epochs=3"], [twice, "--config.train.steps=5"]):
        finished = check([*flags, *other], 1)["finished"]
        assert finished == ("--config.train.steps=5" in other)


def test_what_a_finished_run_did_otherwise(place):
    (place / "run").mkdir()
    (place / "run" / "metrics.jsonl").write_text('{"step": 200, "eval_loss": 1.5}\n')
    flags = ["--config=configs/tiny.py", "--workdir=run"]
    assert check(flags, 1) == GOOD | {"finished": True}  # no record, nothing to compare with
    config = resolve(from_config_dict(read_config_file("configs/tiny.py")), 1, 258).config
    (place / "run" / "config.json").write_text(to_json(config))
    assert check(flags, 8) == GOOD | {"finished": True}  # another mesh is the same run
    assert check([*flags, "--config.optimizer.learning_rate=1"], 1)["changed"] == [
        "optimizer.learning_rate"
    ]


SHARP = """
import moe_jax
from moe_jax.moe.routers.top_k import TopK

class Sharp(TopK):
    pass

moe_jax.ROUTERS["sharp"] = Sharp
moe_jax.DISPATCH["own"] = moe_jax.DISPATCH["capacity"]
"""
CONFIG = """
from moe_jax.config_file import read_config_file

def get_config():
    config = read_config_file("configs/tiny.py")
    config.model.moe.router, config.model.moe.dispatch = "sharp", "own"
    return config
"""


@pytest.mark.parametrize("imported", [False, True])
def test_a_line_knows_only_what_its_own_file_registers(place, monkeypatch, capsys, imported):
    """Also if the file imports the one that registers, or an earlier line registered it."""
    monkeypatch.syspath_prepend(place)
    (place / "own").mkdir()  # a package without __init__.py
    (place / "own" / "router.py").write_text(SHARP)
    (place / "mine.py").write_text(("import own.router\n" if imported else SHARP) + CONFIG)
    (place / "other.py").write_text(CONFIG)
    names = ("mine", "other", "mine", "mine")
    lines = [[f"--config={name}.py", "--workdir=none"] for name in names]
    monkeypatch.setattr("sys.stdin", [json.dumps(line) for line in lines])
    main(["check"])
    first, second, *more = map(json.loads, capsys.readouterr().out.splitlines())
    assert [first, *more] == [GOOD] * 3
    assert second["problem"].startswith("model.moe.router 'sharp' is unknown")
    assert "sharp" not in ROUTERS and "own" not in DISPATCH and "own" not in sys.modules


def test_many_in_one_process(place, cli_env):
    """The command prints one answer per line, in order, even if a config file prints."""
    (place / "loud.py").write_text(
        "from moe_jax.config import default_config\n"
        "def get_config():\n  print('hello')\n  return default_config()\n"
    )
    lines = [
        ["--config=loud.py", "--workdir=a", "--config.mesh.expert=4"],
        ["--config=none.py", "--workdir=b"],
    ]
    done = subprocess.run(
        [sys.executable, "-m", "moe_jax", "check", "--devices=4"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        env=cli_env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "hello" in done.stderr
    good, bad = map(json.loads, done.stdout.splitlines())
    assert good == GOOD
    assert bad["problem"].startswith("--config=none.py: there is no file")
