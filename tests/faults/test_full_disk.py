"""Check 8: a save without space or permission fails with the bytes needed, and loses no step."""

import re
import subprocess
import sys

import pytest
from small_disk import MODES_COUNT, SmallDisk
from small_run import flags
from trainer import OVERRIDES, assert_same_end, checkpoints

from moe_jax.parallel.distributed import DONE, FIX

WHY = {"tmpfs": "No space left on device", "limit": "File too large"}
NEEDS = r"{why}.*; it needs (\d+\.\d) MiB and ([\d.,]+) [KMGT]iB are free\): make room or fix"
SAVES = """
import sys
import numpy as np
from moe_jax.checkpoint import Checkpoints
from moe_jax.errors import UserError

checkpoints = Checkpoints(sys.argv[1])
for step in map(int, sys.stdin):
    try:
        checkpoints.save(step, {"params": {"w": np.full(2**20, step, np.float32)}})
        checkpoints.wait()
        print("saved", flush=True)
    except UserError as error:
        print(error, flush=True)
"""


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request, tmp_path, monkeypatch):
    """A disk of 80 MiB, little more than a run requires: a tmpfs (if possible) and a file limit."""
    if request.param == "limit":
        monkeypatch.setattr("small_disk._NAMESPACES", ())
    with SmallDisk(tmp_path / "disk", 80 * 2**20) as made:
        yield made


def test_a_full_disk_and_a_read_only_folder(disk, cli_env):
    root = disk.folder / "checkpoints"
    program = [sys.executable, "-c", MODES_COUNT, sys.executable, "-c", SAVES, str(root)]
    process = subprocess.Popen(
        [*disk.prefix, *program],
        env=cli_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def save(step: int) -> str:
        assert process.stdin and process.stdout
        print(step, file=process.stdin, flush=True)
        return process.stdout.readline()

    here = disk.here / "checkpoints"
    try:
        assert save(1) == "saved\n"
        disk.fill(process, leave=2**20)
        said = save(2)
        assert said.startswith(f"The checkpoint {root / '2'} cannot be written (")
        needed, free = re.search(NEEDS.format(why=WHY[disk.kind]), said).groups()
        assert needed == "4.0" and (disk.kind == "limit" or 0.5 < float(free) <= 1.0)
        disk.make_room(process)
        assert save(2) == "saved\n"
        assert sorted(path.name for path in here.iterdir()) == [
            "1",
            "2",
        ]  # no unfinished checkpoint

        here.chmod(0o555)
        said = save(3)
        assert f"{root / '3'} cannot be written (" in said
        assert re.search(NEEDS.format(why="Permission denied"), said)
        here.chmod(0o755)
        assert save(3) == "saved\n"
        assert checkpoints(disk.here).latest_good() == 3
    finally:
        process.kill()
        process.communicate()


@pytest.mark.full
def test_a_run_goes_on_once_there_is_room(disk, tmp_path, corpus, trainers):
    straight = tmp_path / "straight"
    assert trainers(flags(straight, corpus, **OVERRIDES)).finish() == DONE
    folder, here = disk.folder / "run" / "checkpoints", disk.here / "run" / "checkpoints"
    python = [sys.executable, "-m", "moe_jax", "train"]
    program = [*disk.prefix, sys.executable, "-c", MODES_COUNT, *python]
    command = flags(disk.folder / "run", corpus, **OVERRIDES)

    def stopped(run, why: str) -> int:
        assert run.finish(60) == FIX, run.text  # Orbax would wait for minutes
        assert "Traceback" not in run.text
        pattern = f"^Error: The checkpoint {folder}/\\d+ cannot be written \\({NEEDS}"
        assert re.search(pattern.format(why=why), run.lines[-1]), run.text
        last = checkpoints(disk.here / "run").latest_good()
        assert last is not None and checkpoints(disk.here / "run").quarantined() == []
        return last

    run = trainers(command, program=program)
    run.wait_for("^step 5/")
    disk.fill(run.process, leave=2**17)
    last = stopped(run, WHY[disk.kind])
    disk.make_room(run.process)

    run = trainers(command, program=program)
    run.wait_for(f"^resuming from step {last}$")
    run.wait_for(f"^step {last + 1}/")
    here.chmod(0o555)
    last = stopped(run, "Permission denied")
    here.chmod(0o755)

    run = trainers(command, program=program)
    run.wait_for(f"^resuming from step {last}$")
    assert run.finish() == DONE, run.text
    assert_same_end(disk.here / "run", straight, 40)
