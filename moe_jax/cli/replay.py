"""Repeat one step of a run: python -m moe_jax replay --workdir=DIR --step=N

Restores the newest good checkpoint before step N, repeats the steps up to N on the same batches,
and prints the loss, the gradient norm, whether the step was skipped, and each layer's routing.
Exits 0 if all of these equal the run's log bit for bit, else 1 with one sentence.  If the step was
not logged, the next logged step is compared.  Each step uses the config, the mesh and the number of
devices that it had in the run (settings.jsonl); on the CPU, virtual devices.  Nothing in the
workdir is moved or written.
"""

from collections.abc import Sequence

import jax
from etils import epath

from moe_jax.checkpoint import Checkpoints
from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.errors import UserError
from moe_jax.parallel import distributed
from moe_jax.parallel.xla_flags import use_virtual_devices
from moe_jax.record.rewind import REWINDS, check_rewinds
from moe_jax.record.settings import settings_at
from moe_jax.run import agree
from moe_jax.run.flight import record_path
from moe_jax.run.setup import set_numerics
from moe_jax.tools.replay import (
    MOST_VIRTUAL,
    describe,
    differences,
    excuse,
    find_judge,
    find_start,
    read_flight,
    read_log,
    replay,
    say,
    split_segments,
)


def main(argv: Sequence[str]) -> int:
    """Print the repeated step; return 1 if it differs from the log."""
    given = parse(argv, COMMANDS["replay"]).flags
    workdir, step = epath.Path(given.workdir), given.step
    if step < 1:
        raise UserError(f"--step={step}: steps are counted from 1.")
    # ---- the logs of the run
    past = read_log(workdir)
    if given.flight and record_path(workdir, step).exists():
        past = read_flight(workdir, step, past)
    # ---- the devices and the state of the run
    distributed.start(given.coordinator, given.process_count, given.process_id)
    asked = ("step", "flight", "from_beginning", "init_from")
    agree.check_start(None, {name: getattr(given, name) for name in asked})
    settings = settings_at(past.settings, step)
    if settings.platform == "cpu" and not given.devices and not jax.distributed.is_initialized():
        use_virtual_devices(min(settings.devices, MOST_VIRTUAL))
    set_numerics(settings.typed())
    checkpoints = Checkpoints(workdir / "checkpoints")
    start = find_start(checkpoints, step, past, given.from_beginning)
    if start:
        check_rewinds(past.rewinds, start, checkpoints, workdir / REWINDS)
    judge = find_judge(past, start, step)
    segments = split_segments(past.settings, start, max(step, judge))
    # ---- repeat the steps and compare
    say(f"replaying steps {start + 1} to {max(step, judge)}")
    rows = replay(workdir, start, segments, past.rewinds, {step, judge}, given.init_from)
    say(describe(rows[step]))
    different = differences(rows[judge], past.rows[judge])
    if different:
        names, why = ", ".join(different), excuse(segments)
        say(f"Step {judge} differs from {past.source} in {names}{why}.")
        return 1
    unlogged = "" if judge == step else f" (step {step} is not in {past.source})"
    say(f"Step {judge} equals {past.source} bit for bit{unlogged}.")
    return 0
