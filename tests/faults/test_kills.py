"""Checks 1, 2, 3 and 13: a run that is killed or stopped anywhere ends equal to a straight one."""

import random
import signal
import sys
from pathlib import Path

import pytest
from small_run import flags
from trainer import OVERRIDES, Trainer, assert_same_end, checkpoints, peers

from moe_jax.parallel.distributed import AGAIN, DONE

STEPS = int(str(OVERRIDES["train.steps"]))
# Files that appear during a save, in this order; the last two belong to the commit.
PHASES = {
    "begun": "*.orbax-checkpoint-tmp",
    "writing": "*.orbax-checkpoint-tmp/ocdbt.process_0/d/*",
    "merged": "*.orbax-checkpoint-tmp/manifest.ocdbt",
    "hashed": "*.orbax-checkpoint-tmp/manifest.json",
    "committed": "*[0-9]/commit_success.txt",
}
# Records the tokens of each step; it also reads ahead, beyond the last step that is trained.
NOTES = """
import hashlib, sys
from moe_jax.data.pipeline import Batches
from moe_jax.cli.exit import run
from moe_jax.cli.train import main

note, sys.argv = sys.argv[1], ["moe_jax train", *sys.argv[2:]]
rows = Batches.rows

def noted(self, step, row_ids):
    batch = rows(self, step, row_ids)
    with open(note, "a") as file:
        print(step, list(row_ids), hashlib.sha256(batch.tokens_BT.tobytes()).hexdigest(), file=file)
    return batch

Batches.rows = noted
run(main)
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus, cli_env):
    """The workdir of a run that was never stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run = Trainer(flags(workdir, corpus, **OVERRIDES), cli_env)
    assert run.finish() == DONE, run.text
    return workdir


def until_phase(run: Trainer, folder: Path, phase: str, looks: int) -> bool:
    """Wait until a new save reaches the phase, then list the folder `looks` more times.

    Returns False if the run ends before.
    """

    def seen() -> set[Path]:
        try:
            return set(folder.glob(PHASES[phase]))
        except FileNotFoundError:  # renamed while glob listed it
            return set()

    before = seen()
    while not seen() - before:
        if run.process.poll() is not None:
            return False
    for _ in range(looks):
        list(folder.iterdir())
    return True


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_random_points_of_saves(tmp_path, corpus, straight, trainers, seed):
    """Check 1, with ten kills per seed.  `looks` delays a kill by some milliseconds."""
    draw = random.Random(seed)
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"
    kills = 0
    while kills < 10:
        run = trainers(flags(workdir, corpus, **OVERRIDES))
        last = checkpoints(workdir).latest_good()
        if last is not None:
            run.wait_for(f"^resuming from step {last}$")
        if not until_phase(run, folder, draw.choice(list(PHASES)), draw.randrange(200)):
            assert run.finish() == DONE, run.text
            break
        run.process.send_signal(signal.SIGKILL)
        kills += run.finish() == -signal.SIGKILL
        assert checkpoints(workdir).quarantined() == []
    run = trainers(flags(workdir, corpus, **OVERRIDES))
    assert run.finish() == DONE, run.text
    assert kills >= 5 and checkpoints(workdir).quarantined() == []
    assert_same_end(workdir, straight, STEPS)


@pytest.mark.full
def test_sigterm_while_compiling_during_a_save_and_twice(
    tmp_path, corpus, straight, trainers, cli_env
):
    """Check 3: each stop ends with 42, no checkpoint is bad, the end equals the straight run."""
    workdir = tmp_path / "run"
    command = flags(workdir, corpus, **OVERRIDES)
    compiles = cli_env | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "empty")}

    def stopped(run: Trainer, times: int = 1) -> int:
        for _ in range(times):
            run.process.send_signal(signal.SIGTERM)
        assert run.finish() == AGAIN, run.text
        steps = checkpoints(workdir).steps()
        assert [checkpoints(workdir).verify(step) for step in steps] == [None] * len(steps)
        return max(steps, default=0)

    run = trainers(command, env=compiles)
    run.wait_for("^1 x 32 rows of")  # the state is being initialized, which compiles
    assert stopped(run) == 0
    run = trainers(command, env=compiles)
    run.wait_for("^state ready")
    while not list(workdir.glob("tensorboard/*")):  # appears just before the compilation
        assert run.process.poll() is None
    # The compilation ends and one step runs; a signal just before it stops the run at step 0.
    assert stopped(run) in (0, 1) and "^step 2/" not in run.text

    run = trainers(command)
    assert until_phase(run, workdir / "checkpoints", "writing", 0)
    during = stopped(run)
    run = trainers(command)
    run.wait_for(f"^step {during + 1}/")
    assert stopped(run, times=2) > during

    run = trainers(command)
    assert run.finish() == DONE, run.text
    assert_same_end(workdir, straight, STEPS)


@pytest.mark.full
def test_a_resumed_run_is_given_the_same_tokens(tmp_path, corpus, trainers):
    """Check 13 for example ids; every test here compares the numbers and the state."""
    notes = {}
    program = [sys.executable, "-c", NOTES]
    for name, stops in {"straight": (8,), "stopped": (3, 8)}.items():
        for steps in stops:
            values = OVERRIDES | {"train.steps": steps}
            note = str(tmp_path / f"{name}-{steps}")
            run = trainers([note, *flags(tmp_path / name, corpus, **values)], program=program)
            assert run.finish() == DONE, run.text
            lines = (line.partition(" ") for line in Path(note).read_text().splitlines())
            notes[name, steps] = {int(step): tokens for step, _, tokens in lines}
    assert set(notes["stopped", 8]) == set(range(3, 8))
    whole = notes["stopped", 3] | notes["stopped", 8]
    assert whole == notes["straight", 8] and len(set(whole.values())) == 8
    assert_same_end(tmp_path / "stopped", tmp_path / "straight", 8)


@pytest.mark.full
def test_sigterm_to_one_of_two_hosts(tmp_path, corpus, trainers):
    """Check 2."""
    values = OVERRIDES | {"mesh.data": 2, "checkpoint.every_steps": 0}
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    for run in [trainers([*flags(straight, corpus, **values), *own]) for own in peers(2, 1)]:
        assert run.finish() == DONE, run.text

    pair = [trainers([*flags(workdir, corpus, **values), *own]) for own in peers(2, 1)]
    pair[0].wait_for("^step 3/")
    pair[1].process.send_signal(signal.SIGTERM)
    assert [run.finish() for run in pair] == [AGAIN, AGAIN], pair[0].text
    [step] = checkpoints(workdir).steps()
    assert checkpoints(workdir).verify(step) is None and 3 <= step < STEPS
    assert f"preempted: step {step} is saved" in pair[0].text

    pair = [trainers([*flags(workdir, corpus, **values), *own]) for own in peers(2, 1)]
    pair[0].wait_for(f"^resuming from step {step}$")
    assert [run.finish() for run in pair] == [DONE, DONE], pair[0].text
    assert_same_end(workdir, straight, STEPS)
