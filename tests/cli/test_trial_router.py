"""A router that one file outside the package registers, through every command that meets it.

Before each command the name is forgotten, as in a process of its own.
"""

import json
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_run import ONE_LAYER, SMALL, train_rows, write_corpus

import moe_jax
from moe_jax.cli import bench, doctor, plan, replay, results, train
from moe_jax.errors import UserError
from moe_jax.moe.routers import ROUTERS
from moe_jax.parallel.distributed import DONE

pytestmark = pytest.mark.lifecycle

FILE = '''
import dataclasses
import jax
import jax.numpy as jnp
import moe_jax
from moe_jax.config import default_config

@dataclasses.dataclass(frozen=True)
class Sharp(moe_jax.LinearRouter):
    """Top-k of a softmax at a temperature."""

    top_k: int = 2
    temperature: float = 1.0

    @property
    def choices_per_token(self):
        return self.top_k

    def route(self, inputs, params, state):
        logits = self.logits(inputs, params["kernel"]) / self.temperature
        probs = jax.nn.softmax(logits)
        weights, ids = jax.lax.top_k(probs, self.top_k)
        choice = moe_jax.TokenChoice(ids, weights, jnp.ones(ids.shape, bool))
        return choice, self.aux(inputs, logits, probs, ids)

moe_jax.ROUTERS["sharp"] = Sharp

def get_config(arg="8"):
    config = default_config()
    config.update_from_flattened_dict(VALUES)
    config.model.moe.router = "sharp"
    config.train.steps = int(arg)
    return config
'''
REGISTER = "register it first: import the file that defines it, or pass --config=FILE"


@pytest.fixture(autouse=True)
def forgotten():
    yield
    ROUTERS.pop("sharp", None)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trial")
    values = SMALL | ONE_LAYER
    values |= {"data.files": write_corpus(folder / "text"), "checkpoint.every_steps": 2}
    values |= {"eval.rows": 16, "eval.samples": 0, "train.batch_size": 16}
    values |= {"model.moe.options.sharp.temperature": 0.5, "model.moe.num_experts": 4}
    (folder / "mine.py").write_text(f"VALUES = {values!r}\n{FILE}")
    return str(folder / "mine.py")


def started(config: str, workdir: Path) -> None:
    """Train in this process, and unregister the router afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert train.main(["train", f"--config={config}", f"--workdir={workdir}"]) == DONE
    finally:
        signal.signal(signal.SIGTERM, before)
        ROUTERS.pop("sharp", None)


@pytest.fixture(scope="module")
def workdir(config_file, tmp_path_factory) -> Path:
    """The workdir of a run of four steps, resumed for two more."""
    folder = tmp_path_factory.mktemp("trial_runs") / "run"
    started(f"{config_file}:4", folder)
    started(f"{config_file}:6", folder)
    return folder


def test_it_trains_and_resumes(workdir):
    assert [row["step"] for row in train_rows(workdir)] == [1, 2, 3, 4, 5, 6]
    options = json.loads((workdir / "config.json").read_text())["model"]["moe"]["options"]
    assert options["sharp"]["temperature"] == 0.5


def test_another_command_line_resumes_only_what_it_registers(workdir):
    tiny = Path(__file__).resolve().parents[2] / "configs" / "tiny.py"
    with pytest.raises(UserError, match=REGISTER) as raised:
        started(str(tiny), workdir)
    assert "damaged" not in str(raised.value) and "restore the file" not in str(raised.value)


def test_a_step_is_replayed_with_the_file(config_file, workdir, monkeypatch, capsys):
    monkeypatch.setattr(replay, "use_virtual_devices", lambda count: None)  # they exist already
    command = ["replay", f"--workdir={workdir}", "--step=6"]
    with pytest.raises(UserError, match=f"^settings.jsonl: model.moe.router 'sharp'.*{REGISTER}"):
        replay.main(command)
    assert replay.main([*command, f"--config={config_file}:4"]) == DONE
    assert "Step 6 equals metrics.jsonl" in capsys.readouterr().out


def test_it_is_loaded_once_the_caller_has_registered_it(config_file, workdir, tmp_path):
    with pytest.raises(UserError, match=f"config.json: model.moe.router 'sharp'.*{REGISTER}"):
        moe_jax.load(workdir)
    moe_jax.load_config(config_file)  # runs the file
    loaded = moe_jax.load(workdir)
    assert loaded.config.moe.options["sharp"]["temperature"] == 0.5
    loaded.save(tmp_path / "saved")
    tokens = jnp.arange(8)[None]
    again = moe_jax.load(tmp_path / "saved").logits(tokens)
    np.testing.assert_array_equal(loaded.logits(tokens), again)


def test_results_shows_the_run_with_the_file(config_file, workdir, capsys):
    command = ["results", f"--workdir={workdir.parent}"]
    results.main(command)
    shown = capsys.readouterr().out
    assert REGISTER in shown and "damaged" not in shown
    results.main([*command, f"--config={config_file}"])
    assert REGISTER not in capsys.readouterr().out


def test_it_is_compiled_for_a_machine_that_is_not_here(config_file, capsys):
    """The separate compile process must register the router as well."""
    assert plan.main(["plan", f"--config={config_file}", "--topology=v5e:2x2"]) == 0
    shown = capsys.readouterr().out
    assert "compiled for this topology by libtpu" in shown and shown.endswith("fits: yes\n")


def test_the_benchmark_takes_it(config_file, tmp_path, capsys):
    bench.main(["bench", f"--config={config_file}", f"--workdir={tmp_path}", "--steps=2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_doctor_takes_it(config_file, monkeypatch, capsys):
    """The doctor builds the model and its files; the checks have their own tests."""
    asked = []
    monkeypatch.setattr(doctor, "examine", lambda subject, checks, say: asked.append(subject) or 0)
    monkeypatch.setattr(doctor.jax.config, "update", lambda name, value: None)
    assert doctor.main(["doctor", f"--config={config_file}"]) == 0
    assert asked[0].config.model.moe.router == "sharp"


def test_the_doctor_holds_it_to_the_formulas(config_file, monkeypatch):
    """--conformance needs no config, but accepts one for the names that it registers."""
    from moe_jax.tools.doctor.conformance import run

    asked = []
    monkeypatch.setattr(run, "main_conformance", lambda full, say: asked.append(set(ROUTERS)) or 0)
    monkeypatch.setattr(doctor.jax.config, "update", lambda name, value: None)
    doctor.main(["doctor", "--conformance", f"--config={config_file}"])
    assert "sharp" in asked[0]
