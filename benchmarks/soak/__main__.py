"""Kills a run of two processes at random moments, in every phase, until the run is finished.

    python -m benchmarks.soak --workdir=DIR [--kills=40] [--seed=0]

Two processes on CPUs, each under launch/supervise.py, train a small model on a small corpus twice:
once uninterrupted and once with --kills kills.  For each kill the seed decides the phase, the
moment in it, the signal (SIGKILL, SIGTERM, or SIGSTOP and later SIGCONT), and whether one process
or both get it.  The second run must equal the first bit for bit: every leaf of the last checkpoint,
every logged loss and count, the held-out results, the samples and the store.  The exit code is 1 if
they differ, with a line per difference, or if a process hangs or its supervisor gives up.

It takes about 15 s per kill on two cores and needs Linux.  DIR must be new; it keeps both runs and
the output of all processes.
"""

import argparse
import collections
import dataclasses
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.soak.compare import differences
from benchmarks.soak.pair import (
    END,
    EVALUATION,
    HEARTBEAT,
    PHASES,
    ROOT,
    START,
    STEPS,
    STORE,
    Pair,
    send,
)
from moe_jax.files.formats import table

LIMIT = 400.0  # seconds; longer than JAX waits for a missing process (300)
POLL = 0.002  # seconds; a save takes about ten times as long
UNMET = (START, STORE)  # phases in which the processes may not be connected yet
SAVE_EVERY, EVAL_EVERY = 7, 15
STEPS_A_KILL = 20  # most steps that pass before a kill reaches its phase
FIRST = 8  # of FIRST kills, one hits the store build while there is one, and one hits the end
WORDS = ("the", "model", "reads", "a", "small", "text", "and", "learns", "which", "word", "follows")
MODEL = {
    "model.num_layers": 1,
    "model.moe.every": 1,
    "model.width": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 16,
    "model.ffn_width": 64,
    "model.moe.expert_width": 32,
    # Its bias is state of the router, which the checkpoint must restore.
    "model.moe.router": "sigmoid_bias",
    "model.moe.options.sigmoid_bias.update_rate": 0.01,
    "mesh.data": 1,
    "mesh.expert": 2,  # every layer needs the other process
    "data.source": "text",
    "data.sequence_length": 32,
    "train.batch_size": 16,
    "train.log_every": 1,
    "train.ledger_every": 10,
    "optimizer.warmup_steps": 4,
    "eval.every": EVAL_EVERY,
    "eval.rows": 32,
    "eval.samples": 1,
    "eval.sample_tokens": 8,
    "checkpoint.every_steps": SAVE_EVERY,
    "checkpoint.every_minutes": 0,
    "watchdog.start": 60,
    "watchdog.compile": 200,
    "watchdog.step": 60,
    "watchdog.data": 60,
    "watchdog.checkpoint": 60,
    "watchdog.evaluation": 60,
    "watchdog.heartbeat": HEARTBEAT,
}
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    # Process 0 alone writes to the compile cache and process 1 finds nothing in it, so process 1
    # compiles each time.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """The random choices of one kill."""

    phase: str
    moment: float  # as a share of the phase's last complete duration
    steps: int  # steps to wait first, if the phase is STEPS
    targets: tuple[int, ...]
    signal: int
    stopped: float  # seconds between SIGSTOP and SIGCONT


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=float, default=80.0, help="megabytes (default: 80)")
    given = parser.parse_args()
    if given.workdir.exists():
        parser.error(f"--workdir={given.workdir} exists: use a new folder")
    problems = soak(given.workdir.absolute(), given.kills, given.seed, given.corpus)
    for problem in problems:
        print(f"DIFFERENT: {problem}")
    print("FAILED" if problems else "the two runs are equal to the last bit")
    return 1 if problems else 0


def soak(folder: Path, kills: int, seed: int, megabytes: float) -> list[str]:
    """Make both runs; return their differences, or errors."""
    files = write_corpus(folder / "text", megabytes, random.Random(seed))
    steps = STEPS_A_KILL * (kills + 1)
    values = MODEL | {"train.steps": steps, "data.files": files}
    arguments = [
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    env = {**cache, **os.environ, **SETTINGS, "PYTHONPATH": str(ROOT)}

    began = time.monotonic()
    with Pair(folder / "alone", arguments, EVAL_EVERY, env) as alone:
        problem = until_the_end(alone)
        if problem:
            return [f"the uninterrupted run: {problem}\n{alone.tail()}"]
    took = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in alone.seconds.items())
    print(f"uninterrupted: {steps} steps in {time.monotonic() - began:.0f} s ({took})", flush=True)

    began = time.monotonic()
    with Pair(folder / "killed", arguments, EVAL_EVERY, env) as killed:
        killed.seconds = dict(alone.seconds)
        done, problem = carry_out(killed, plan(kills, random.Random(seed)))
        problem = problem or until_the_end(killed)
        print(summary(done, killed, time.monotonic() - began), flush=True)
        if problem:
            return [f"the killed run: {problem}\n{killed.tail()}"]
    if len(done) < kills:
        return [f"the killed run finished after {len(done)} of {kills} kills"]
    return differences(alone.workdir, killed.workdir, steps)


def write_corpus(folder: Path, megabytes: float, draw: random.Random) -> str:
    """Write text files of half a megabyte; return their glob."""
    folder.mkdir(parents=True)
    for number in range(max(2, round(2 * megabytes))):
        (folder / f"{number:04d}.txt").write_text(" ".join(draw.choices(WORDS, k=100_000)) + "\n")
    return str(folder / "*.txt")


def plan(kills: int, draw: random.Random) -> list[Kill]:
    """Choose the kills, in the order in which their phases occur: builds first, the end last."""
    ends = -(-kills // FIRST)
    middle = draw.sample([p for p in PHASES if p not in (STORE, END)], len(PHASES) - 2)
    between = [middle[number % len(middle)] for number in range(kills - 2 * ends)]
    draw.shuffle(between)
    phases = [STORE] * ends + between + [END] * ends
    drawn = [draw_kill(phase, draw) for phase in phases]
    # Each attempt continues the previous build, so the first kills must leave something to build.
    return [
        dataclasses.replace(kill, moment=kill.moment / (ends + 1)) if kill.phase == STORE else kill
        for kill in drawn
    ]


def draw_kill(phase: str, draw: random.Random) -> Kill:
    """Choose everything about a kill except its phase."""
    targets = draw.choices([(0,), (1,), (0, 1)], [2, 2, 1])[0]
    number = draw.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], [7, 2, 1])[0]
    # Either too short to be detected, or long enough for the heartbeat to fail.
    stopped = draw.choice([1.0, HEARTBEAT + 4.0])
    return Kill(phase, draw.random(), draw.randrange(10), targets, number, stopped)


def carry_out(pair: Pair, kills: list[Kill]) -> tuple[list[tuple[str, Kill]], str]:
    """Carry out the kills; return (each kill with the phase that it hit, error or "")."""
    done: list[tuple[str, Kill]] = []
    for kill in kills:
        hits: list[int] = []
        while not hits:  # if the target has just ended by itself, wait for the next one
            problem = wait_for_moment(pair, kill)
            if problem or None not in pair.codes():
                return done, problem
            hit, before = pair.phase(), pair.pids()
            hits = [pid for target in kill.targets if (pid := before[target]) is not None]
        send(hits, kill.signal)
        done.append((hit, kill))
        name = signal.Signals(kill.signal).name
        who = " and ".join(map(str, kill.targets))
        print(f"{len(done)}: {name} to process {who} in {hit}, step {pair.step}", flush=True)
        if kill.signal == signal.SIGSTOP:
            time.sleep(kill.stopped)
            send(hits, signal.SIGCONT)
        elif problem := wait_for_others(pair, before, kill.targets if hit in UNMET else (0, 1)):
            return done, problem
    return done, ""


def wait_for_moment(pair: Pair, kill: Kill) -> str:
    """Wait until both processes run and the run is in the kill's phase; return an error or ""."""
    wish = kill.phase
    if wish == STORE and pair.built():
        wish = START
    if wish == START and pair.phase() != START:  # a short stop caused no restart
        wish = STEPS

    def there() -> bool:
        return pair.phase() in (wish, END) and None not in pair.pids()

    if problem := until(pair, there):
        return problem
    if wish == STEPS:
        later = pair.step + kill.steps
        if problem := until(pair, lambda: pair.step >= later or pair.phase() in (START, END)):
            return problem
    # The last step is followed by an evaluation, which is repeated if it is killed.
    span = EVALUATION if pair.phase() == END else pair.phase()
    time.sleep(kill.moment * pair.seconds.get(span, 0.0))
    return ""


def wait_for_others(pair: Pair, before: list[int | None], who: tuple[int, ...]) -> str:
    """Wait until new processes have replaced those in `before`; return an error or ""."""

    def replaced() -> bool:
        now, codes = pair.pids(), pair.codes()
        return all(codes[i] == 0 or now[i] not in (None, before[i]) for i in who)

    return until(pair, replaced)


def until_the_end(pair: Pair) -> str:
    """Wait until both supervisors have ended; return an error or ""."""
    return until(pair, lambda: False)


def until(pair: Pair, condition: Callable[[], bool]) -> str:
    """Wait until the condition holds or both supervisors have ended with 0; return "" then.

    Returns an error if a supervisor ends with another code, or nothing happens for LIMIT seconds.
    """
    began = time.monotonic()
    while not condition():
        pair.phase()
        codes = pair.codes()
        if any(codes):
            return f"the supervisors ended with {codes}"
        if None not in codes:
            return ""
        if time.monotonic() - max(began, pair.heard) > LIMIT:
            return f"nothing happened for {LIMIT:g} s"
        time.sleep(POLL)
    return ""


def summary(done: list[tuple[str, Kill]], pair: Pair, seconds: float) -> str:
    """Format the kills by phase and signal, and the restarts."""
    numbers = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
    counts = collections.Counter((hit, kill.signal) for hit, kill in done)
    rows = [["phase", *(number.name for number in numbers), "kills"]]
    for phase in PHASES:
        row = [counts[phase, number] for number in numbers]
        rows.append([phase, *map(str, row), str(sum(row))])
    total = [sum(counts[phase, number] for phase in PHASES) for number in numbers]
    rows.append(["all", *map(str, total), str(sum(total))])
    lead, other = (pair.said(index) for index in range(2))
    reasons = collections.Counter(line[1].split(";")[0] for line in [*lead, *other])
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return (
        f"{table(rows, left=1)}\n{len(lead)} and {len(other)} restarts ({said}), "
        f"{sum(int(line[2]) for line in lead)} steps lost, {seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
