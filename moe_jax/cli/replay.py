"""One step of a run again: python -m moe_jax replay --workdir=DIR --step=N

Restores the newest good checkpoint before step N, takes the steps to N with the data they had, and
prints loss, gradient norm, whether the step was refused, and each layer's routing.  Exits 0 where
all of it equals, bit for bit, what the run wrote down, else 1 with one sentence.  A step that was
not logged is judged by the next one that was.  Each step is taken with the config, the mesh and as
many devices as it was then (settings.jsonl); on the CPU virtual devices are made for it.  Nothing
in the workdir is moved or written.
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
from moe_jax.record.settings import settings_of
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
    split_legs,
)


def main(argv: Sequence[str]) -> int:
    """Prints the step; returns 1 where it is not what was written down."""
    given = parse(argv, COMMANDS["replay"]).flags
    workdir, step = epath.Path(given.workdir), given.step
    if step < 1:
        raise UserError(f"--step={step}: steps are counted from 1.")
    # ---- what is known
    past = read_log(workdir)
    if given.flight and record_path(workdir, step).exists():
        past = read_flight(workdir, step, past)
    # ---- the machine as it was
    distributed.start(given.coordinator, given.process_count, given.process_id)
    asked = ("step", "flight", "from_beginning", "init_from")
    agree.check_start(None, {name: getattr(given, name) for name in asked})
    settings = settings_of(past.settings, step)
    if settings.platform == "cpu" and not given.devices and not jax.distributed.is_initialized():
        use_virtual_devices(min(settings.devices, MOST_VIRTUAL))
    set_numerics(settings.typed())
    checkpoints = Checkpoints(workdir / "checkpoints")
    start = find_start(checkpoints, step, past, given.from_beginning)
    if start:
        check_rewinds(past.rewinds, start, checkpoints, workdir / REWINDS)
    judge = find_judge(past, start, step)
    legs = split_legs(past.settings, start, max(step, judge))
    # ---- the steps, and what they are held against
    say(f"replaying steps {start + 1} to {max(step, judge)}")
    rows = replay(workdir, start, legs, past.rewinds, {step, judge}, given.init_from)
    say(describe(rows[step]))
    different = differences(rows[judge], past.rows[judge])
    if different:
        names, why = ", ".join(different), excuse(legs)
        say(f"Step {judge} is not what {past.source} has: {names} differ{why}.")
        return 1
    unlogged = "" if judge == step else f" (step {step} is not in {past.source})"
    say(f"Step {judge} is bit for bit what {past.source} has{unlogged}.")
    return 0
