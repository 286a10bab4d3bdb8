"""Checks mesh, memory, checkpoints and data."""

import dataclasses
from typing import Any

import jax

from moe_jax.files import formats
from moe_jax.parallel.replicas import bit_hash
from moe_jax.run.loop import save
from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.subject import STEPS, Subject
from moe_jax.tools.plan.analytic import estimate
from moe_jax.train.state import TrainState, replicated

MOST_WAIT = 0.1  # as a share of a step


def divides(subject: Subject) -> Finding:
    """Report the resolved mesh and batch; resolving them has already checked that they divide."""
    config = subject.plan.config
    rows = config.train.batch_size // config.train.accumulation // config.mesh.batch_shards
    sizes = dataclasses.asdict(config.mesh).items()
    mesh = " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "1 device"
    figure = f"{mesh}: {rows} rows per device and microbatch"
    if not config.model.dense:
        group = config.model.moe.group_rows
        tokens = group * config.data.sequence_length
        figure += f", groups of {group} rows, {tokens:,} tokens"
    return Finding(True, figure)


def memory(subject: Subject) -> Finding:
    """Compare the plan's analytic estimate for the config as written with the device's memory."""
    needed = estimate(subject.plan)
    state = needed.parameters + needed.gradients + needed.optimizer
    figure = (
        f"{formats.size(needed.total)} per device (mesh of {subject.plan.mesh.size}): "
        f"{formats.size(state)} of parameters, gradients and optimizer"
    )
    stats = None if subject.shrunk else subject.devices[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return Finding(True, f"{figure}; only reported, no accelerator to compare with")
    limit = float(stats["bytes_limit"])
    return Finding(
        needed.total <= limit,
        f"{figure}; a device has {formats.size(limit)}",
        "Raise mesh.fsdp, mesh.expert or train.accumulation, or set model.remat: `python -m "
        "moe_jax plan --search` ranks them.",
    )


def saves_bitwise(subject: Subject) -> Finding:
    """Save the state after some steps, restore it as a resumed run does, and compare every leaf.

    The leaves are compared by checksums on the devices, because two states may not fit at once.
    """
    run = subject.run
    subject.first_steps()  # so that moments and router state differ from their initial values
    marks = jax.jit(_marks, out_shardings=replicated(run.mesh))
    before = jax.device_get(marks(subject.state()))
    save(run, subject.state(), int(subject.state().step))
    run.checkpoints.wait()
    subject.drop_state()
    after = jax.device_get(marks(subject.state()))
    paths = jax.tree.leaves_with_path(before)
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(paths, jax.tree.leaves(after), strict=True)
        if old != new
    ]
    return Finding(
        not bad,
        f"{len(paths) - len(bad)} of {len(paths)} arrays are equal bit by bit",
        f"Check the disk and moe_jax/checkpoint: {', '.join(bad[:4])} changed.",
    )


def _marks(state: TrainState) -> Any:
    return jax.tree.map(bit_hash, state)


def data_wait(subject: Subject) -> Finding:
    """Measure the mean time that a step waits for its batch, as a share of the step."""
    steps = subject.first_steps()
    share = steps.wait / steps.seconds
    figure = f"{share:.1%} of a step ({1e3 * steps.wait:.1f} of {1e3 * steps.seconds:.1f} ms)"
    figure += f", mean of {STEPS}"
    if subject.shrunk:
        return Finding(True, f"{figure}; only reported, the step is shrunk")
    return Finding(
        share <= MOST_WAIT,
        figure,
        "Put data.store on a local or faster disk, or give the host more cores.",
    )
