"""Checks 9 and 10: other meshes and numbers of processes restore a checkpoint bit for bit."""

import shutil

import jax
import numpy as np
import pytest
from small_run import flags, small_config, train_rows
from trainer import OVERRIDES, checkpoints, peers

from moe_jax.checkpoint.tree import array_digest, named_leaves
from moe_jax.parallel.distributed import DONE
from moe_jax.run.context import Run
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare
from moe_jax.train.state import to_disk

STEPS = 4
RUN = OVERRIDES | {"train.steps": STEPS, "model.moe.options.sigmoid_bias.jitter": 0.0}
CLOSE = 1e-4  # of the next losses; float32 sums on another mesh differ in the seventh digit
FIRST = {"data": 2, "expert": 2}
LAYOUTS = [
    (1, {}),
    (2, {"data": 2}),
    (2, {"expert": 2}),
    (4, {"fsdp": 2, "expert": 2}),
    (4, {"expert": 2, "tensor": 2}),
    (8, {"data": 8}),
    (8, {"data": 2, "fsdp": 2, "expert": 2}),
]


def state_digest(run: Run) -> str:
    state = restore_or_init_state(run, "", lambda line: None)
    leaves = named_leaves(to_disk(state, run.model.layout)["params"])
    return array_digest((name, np.asarray(leaves[name])) for name in sorted(leaves))


def sizes(mesh: dict[str, int]) -> dict[str, int]:
    return {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}


@pytest.mark.full
def test_other_devices_and_processes(tmp_path, corpus, trainers):
    """One test, because every case resumes from the same checkpoint of two processes."""
    workdir = tmp_path / "run"
    command = flags(workdir, corpus, **RUN, **sizes(FIRST))
    pair = [trainers([*command, *own]) for own in peers(2, 2)]
    assert [run.finish() for run in pair] == [DONE, DONE], pair[0].text
    expected = checkpoints(workdir).digest(STEPS)
    for devices, mesh in LAYOUTS:
        config = small_config(corpus, **RUN, **sizes(mesh))
        run = prepare(config, workdir, lambda line: None, jax.devices()[:devices])
        assert state_digest(run) == expected, mesh

    ends = {}
    alone = ((1, devices, mesh) for devices, mesh in LAYOUTS[::3])  # on 1, 4 and 8
    cases = [(2, 2, FIRST), (4, 1, FIRST), (1, 2, {"expert": 2}), *alone]
    for processes, devices, mesh in cases:
        folder = tmp_path / f"{len(ends)}"
        shutil.copytree(workdir, folder)
        own = peers(processes, devices) if processes > 1 else [[f"--devices={devices}"]]
        command = flags(folder, corpus, **RUN | sizes(mesh) | {"train.steps": STEPS + 2})
        runs = [trainers([*command, *mine]) for mine in own]
        assert [run.finish() for run in runs] == [DONE] * processes, runs[0].text
        assert f"resuming from step {STEPS}" in runs[0].lines
        ends[folder.name] = [row["loss"] for row in train_rows(folder)[STEPS:]]
    for name, losses in ends.items():
        assert len(losses) == 2, name
        np.testing.assert_allclose(losses, ends["0"], rtol=CLOSE, err_msg=str(cases[int(name)]))
