"""Sweep files become named runs and command lines; the shipped sweep files are valid."""

import re
from pathlib import Path

import pytest

from launch.job import Job
from launch.runs import expand, job, run_name
from launch.shell import LaunchError
from moe_jax.cli.check import check
from moe_jax.config import from_config_dict
from moe_jax.config_file import read_config_file
from moe_jax.model.define import define
from moe_jax.model.flops import flops_per_token

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs/sweeps").glob("*.py"))


def sweep_file(folder: Path, body: str) -> str:
    path = folder / "sweep_of_test.py"
    path.write_text(f"def get_hyper(hyper):\n    return {body}\n")
    return str(path)


# ---- sweep files that we ship


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_sweeps_hold_only_good_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    named = expand(path)
    for name, run in named.items():
        assert re.fullmatch(r"[a-z][a-z0-9-]{0,61}", name)
        run = run | {"config.data.tokenizer": "bytes"}  # some sweeps name one that a command makes
        answer = check(job(name, run, "runs/none").arguments, num_devices=1)
        assert answer == {"problem": None, "finished": False, "changed": []}, name


def configs(path: str) -> list:
    """The typed configs of a sweep's runs."""
    built = []
    for run in expand(path).values():
        config = read_config_file(run["config"])
        config.update_from_flattened_dict(
            {key.removeprefix("config."): run[key] for key in run if key != "config"}
        )
        config.model.vocab_size = 258
        built.append(from_config_dict(config))
    return built


@pytest.mark.parametrize(
    "name",
    [
        "dense_vs_sparse",
        *(pytest.param(n, marks=pytest.mark.lifecycle) for n in ("granularity", "capacity")),
    ],
)
def test_equal_flops(name, monkeypatch):
    """All runs need the same FLOPs per token, without the router (D x E in each of 4 layers)."""
    monkeypatch.chdir(ROOT)
    costs = set()
    for config in configs(f"configs/sweeps/{name}.py"):
        model = config.model
        router = 0 if model.dense else 6 * 4 * model.width * model.moe.num_experts
        costs.add(
            flops_per_token(define(model, config.precision), config.data.sequence_length) - router
        )
    assert len(costs) == 1


def test_granularity_halves_the_width_as_experts_double(monkeypatch):
    monkeypatch.chdir(ROOT)
    moes = [config.model.moe for config in configs("configs/sweeps/granularity.py")]
    shapes = [(moe.num_experts, moe.top_k, moe.expert_width) for moe in moes]
    assert shapes[:3] == [(8, 2, 256), (16, 4, 128), (32, 8, 64)]
    assert shapes[3:] == [(32, 2, 256), (64, 4, 128), (128, 8, 64)]


# ---- names


def test_a_name_is_stable():
    """The names are fixed here: under a new name a finished run would be trained again."""
    run = {"config": "configs/tiny.py:dense", "config.seed": 1, "config.optimizer.clip_norm": 0.5}
    assert run_name(run) == "tiny-dense-cn-0-5-seed-1-f712f2b2"
    assert run_name(dict(reversed(run.items()))) == run_name(run)


def test_names_differ_where_runs_do():
    run = {"config": "configs/tiny.py"} | {f"config.data.key_{i}": "long" * 9 for i in range(9)}
    names = {run_name(run | {"config.seed": seed}) for seed in range(50)}
    names |= {run_name(run | {"config.seed": value}) for value in ("1", True, 1.0)}
    assert len(names) == 53
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,61}", name) for name in names)
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,61}", run_name({"config": "configs/8x7b.py"}))


def test_values_reach_the_trainer_as_it_reads_them():
    run = {"config": "a b.py", "config.x": True, "config.y": 1e-05, "config.z": "it's"}
    assert job("n", run, "W/", ("--devices=8",)) == Job(
        "n",
        (
            "--config=a b.py",
            "--config.x=true",
            "--config.y=1e-05",
            "--config.z=it's",
            "--workdir=W/n",
            "--devices=8",
        ),
    )


def test_a_workdir_may_lie_in_an_object_store():
    assert job("n", {"config": "a.py"}, "gs://b/r").arguments[-1] == "--workdir=gs://b/r/n"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("[]", "returns no runs"),
        ("['config']", "run 0 is 'config'"),
        ("[{'config.seed': 1}]", "run 0 names no config"),
        ("[{'config': 'a.py', 'seed': 1}]", "sets 'seed': use 'config'"),
        ("[{'config': 'a.py', 'config.a': float('nan')}]", "sets config.a to nan"),
        ("[{'config': 'a.py', 'config.a': None}]", "sets config.a to None"),
        ("[{'config': 'a.py', 'config.a': [1]}]", "sets config.a to [1] (list)"),
        ("[{'config': 'a.py', 'config.a': 'b\\0'}]", "leave out the null character"),
        ("[{'config': 'a.py', 'config.a': 10**5000}]", "sets config.a to a number of over 63 bits"),
        ("[{'config': 'a.py', 1: 2}]", "sets 1: use 'config'"),
        ("[{'config': 3}]", "run 0 names no config"),
        ("[None]", "run 0 is None"),
        ("{'config': 'a.py'}", "returns dict, not a list"),
        ("hyper.sweep('config', 5)", "line 2 raises TypeError: 'int' object is not iterable"),
        ("hyper.product(3)", "line 2 raises TypeError"),
        ("hyper.zipit([hyper.fixed('a', 1, 2), hyper.fixed('b', 1, 3)])", "lists of 2 and 3 runs"),
        ("2 * [{'config': 'a.py'}]", "run 1 is the same as run 0"),
    ],
)
def test_what_a_sweep_file_may_not_return(tmp_path, body, sentence):
    with pytest.raises(LaunchError, match=re.escape(sentence)):
        expand(sweep_file(tmp_path, body))


def test_no_sweep_file(tmp_path):
    with pytest.raises(LaunchError, match="there is no file"):
        expand(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(LaunchError, match="defines no get_hyper"):
        expand(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_hyper(hyper)\n    return []", "SyntaxError"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("def get_hyper(hyper):\n    return None", "returns NoneType, not a list"),
        ("def get_hyper(hyper):\n    return 1 / 0", "line 2 raises ZeroDivisionError"),
        ("def get_hyper(hyper):\n    exit(0)", "line 2 exits with 0"),
        ("import sys\nsys.exit()", "line 2 exits with None"),
        ("def get_hyper(): return []", "the file raises TypeError: .*takes 0 positional"),
        ("get_hyper = 3", r"defines no get_hyper\(\)"),
    ],
)
def test_a_broken_sweep_file_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "sweep.py").write_text(text)
    with pytest.raises(LaunchError, match=sentence):
        expand(str(tmp_path / "sweep.py"))
