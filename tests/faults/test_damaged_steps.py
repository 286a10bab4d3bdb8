"""Checks 4 to 7 and 12: damaged checkpoints are reported, and no run starts over."""

import functools
import re
import shutil
import signal
from pathlib import Path

import jax
import pytest
from checkpoint_trees import files_of, flip_bit
from small_run import flags
from trainer import OVERRIDES, Trainer, assert_same_end, checkpoints

from moe_jax.cli import train as trainer
from moe_jax.parallel.distributed import DONE, FIX
from moe_jax.run.setup import prepare

STEPS = 6
RUN = OVERRIDES | {"train.steps": STEPS}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus, cli_env):
    """Workdir of a run that was never stopped, with checkpoints of steps 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run = Trainer(flags(workdir, corpus, **RUN), cli_env)
    assert run.finish() == DONE, run.text
    return workdir


@pytest.fixture
def workdir(tmp_path, straight):
    """A copy that the test may damage."""
    return Path(shutil.copytree(straight, tmp_path / "run"))


@pytest.fixture(autouse=True)
def sigterm():
    """Restore the SIGTERM handler, which the trainer replaces for its whole process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.full
def test_a_cut_step_among_litter(workdir, straight, corpus, trainers):
    """Checks 4, 6 and 12: the cut step is quarantined and trained again, to the same end."""
    folder = workdir / "checkpoints"
    damaged = files_of(folder, STEPS)[0]
    cut(damaged)
    (folder / "50").mkdir()
    shutil.copytree(folder / "4", folder / "60.orbax-checkpoint-tmp")
    (folder / "70").mkdir()
    (folder / "70" / "data").write_bytes(b"no commit marker")

    run = trainers(flags(Path("run"), corpus, **RUN), cwd=workdir.parent)
    assert run.finish() == DONE, run.text
    bad = next(line for line in run.lines if "is bad" in line)
    assert bad.startswith(f"Checkpoint of step {STEPS} is bad ({damaged.relative_to(folder / '6')}")
    assert "bytes instead of" in bad and bad.endswith(f"moved to {folder}/quarantine/{STEPS}.")
    assert "resuming from step 4" in run.lines and "Traceback" not in run.text
    aside = folder / "quarantine" / str(STEPS) / damaged.relative_to(folder / str(STEPS))
    assert aside.stat().st_size > 0
    assert_same_end(workdir, straight, STEPS)


@pytest.mark.full
def test_one_flipped_bit_in_each_file(tmp_path, corpus, capfd, monkeypatch):
    """Check 5."""
    monkeypatch.setattr(trainer, "prepare", functools.partial(prepare, devices=jax.devices()[:1]))
    straight = tmp_path / "straight"
    assert trainer.main(["train", *flags(straight, corpus, **RUN)]) == DONE
    step = straight / "checkpoints" / str(STEPS)
    names = sorted(path.relative_to(step) for path in step.rglob("*") if path.is_file())
    assert len(names) >= 8
    for number, name in enumerate(names):
        workdir = Path(shutil.copytree(straight, tmp_path / str(number)))
        flip_bit(workdir / "checkpoints" / str(STEPS) / name)
        assert trainer.main(["train", *flags(workdir, corpus, **RUN)]) == DONE
        said = capfd.readouterr().out
        assert_same_end(workdir, straight, STEPS)
        # A flipped digit in the manifest is reported as a fault of the file that it describes.
        blamed = "" if name.name == "manifest.json" else name.name
        assert re.search(rf"Checkpoint of step {STEPS} is bad \(.*{blamed}", said), said
        assert "resuming from step 4" in said
        assert checkpoints(workdir).quarantined() == [str(STEPS)]


@pytest.mark.full
def test_when_no_step_is_good(workdir, straight, corpus, trainers):
    """Check 7: one sentence, exit code 1, and no file changes."""
    folder = workdir / "checkpoints"
    for number, step in enumerate((2, 4, STEPS)):
        (cut if number else flip_bit)(files_of(folder, step)[0])
    metrics = (workdir / "metrics.jsonl").read_bytes()
    run = trainers(flags(workdir, corpus, **RUN))
    assert run.finish() == FIX
    said = [line for line in run.lines if line.startswith("Error: ")]
    assert said == run.lines[-1:] and "Traceback" not in run.text
    assert said[0].startswith(f"Error: No checkpoint under {folder} verifies (newest: step {STEPS}")
    assert checkpoints(workdir).steps() == [2, 4, STEPS]
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
