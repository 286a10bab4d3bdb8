"""Kills a run of two processes at random moments, in every phase, until it has come to its end.

    python -m benchmarks.soak --workdir=DIR [--kills=40] [--seed=0]

Two processes on CPUs, each under launch/supervise.py, train a small model on a small corpus twice:
once left alone and once with so many kills.  For each kill the seed draws the phase to hit, the
moment in it, the signal (SIGKILL, SIGTERM, or SIGSTOP and later SIGCONT) and whether one process or
both get it.  The second run must end with the bits of the first: every leaf of the last
checkpoint, every logged loss and count, the held-out results, the samples and the store.  Exits
with 1, naming each difference, if it does not, and if a process hangs or ends for good.

Takes about 15 s a kill on two cores.  Linux only.  DIR must be new; it keeps both runs and the
output of all processes.
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

LIMIT = 400.0  # seconds: beyond what JAX waits for a process that does not come (300)
POLL = 0.002  # seconds; a save takes some ten times as long
UNMET = (START, STORE)  # phases in which a process may not have met the other yet
SAVE_EVERY, EVAL_EVERY = 7, 15
STEPS_A_KILL = 20  # at most so many steps pass before a kill finds its phase
FIRST = 8  # of every so many kills one hits the store build, as long as there is one, one the end
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
    # Its bias is state that only the router has.
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
    # Only process 0 writes to the compile cache and process 1 misses there: it compiles each time.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was drawn for one kill."""

    phase: str
    moment: float  # share of how long the phase took when it last came to its end
    steps: int  # to let pass first, where the phase is STEPS
    targets: tuple[int, ...]
    signal: int
    stopped: float  # seconds between SIGSTOP and SIGCONT


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=float, default=80.0, help="megabytes (default: 80)")
    given = parser.parse_args()
    if given.workdir.exists():
        parser.error(f"{given.workdir} is there already: name a new folder")
    problems = soak(given.workdir.absolute(), given.kills, given.seed, given.corpus)
    for problem in problems:
        print(f"DIFFERENT: {problem}")
    print("FAILED" if problems else "the two runs are equal to the last bit")
    return 1 if problems else 0


def soak(folder: Path, kills: int, seed: int, megabytes: float) -> list[str]:
    """Both runs; what differs between them, or went wrong."""
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
            return [f"the run that was left alone: {problem}\n{alone.tail()}"]
    took = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in alone.seconds.items())
    print(f"left alone: {steps} steps in {time.monotonic() - began:.0f} s ({took})", flush=True)

    began = time.monotonic()
    with Pair(folder / "killed", arguments, EVAL_EVERY, env) as killed:
        killed.seconds = dict(alone.seconds)
        done, problem = carry_out(killed, plan(kills, random.Random(seed)))
        problem = problem or until_the_end(killed)
        print(summary(done, killed, time.monotonic() - began), flush=True)
        if problem:
            return [f"the run that was killed: {problem}\n{killed.tail()}"]
    if len(done) < kills:
        return [f"the run came to its end after {len(done)} of {kills} kills"]
    return differences(alone.workdir, killed.workdir, steps)


def write_corpus(folder: Path, megabytes: float, draw: random.Random) -> str:
    """Text files of half a megabyte; returns their glob."""
    folder.mkdir(parents=True)
    for number in range(max(2, round(2 * megabytes))):
        (folder / f"{number:04d}.txt").write_text(" ".join(draw.choices(WORDS, k=100_000)) + "\n")
    return str(folder / "*.txt")


def plan(kills: int, draw: random.Random) -> list[Kill]:
    """Kills in the order in which their phases can come: builds first, the end last."""
    ends = -(-kills // FIRST)
    middle = draw.sample([p for p in PHASES if p not in (STORE, END)], len(PHASES) - 2)
    between = [middle[number % len(middle)] for number in range(kills - 2 * ends)]
    draw.shuffle(between)
    phases = [STORE] * ends + between + [END] * ends
    drawn = [draw_kill(phase, draw) for phase in phases]
    # Each goes on with the build of the one before: the first kills must leave something to build.
    return [
        dataclasses.replace(kill, moment=kill.moment / (ends + 1)) if kill.phase == STORE else kill
        for kill in drawn
    ]


def draw_kill(phase: str, draw: random.Random) -> Kill:
    """Everything about a kill but its phase."""
    targets = draw.choices([(0,), (1,), (0, 1)], [2, 2, 1])[0]
    number = draw.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], [7, 2, 1])[0]
    # Either short enough for nobody to notice, or long enough to be given up.
    stopped = draw.choice([1.0, HEARTBEAT + 4.0])
    return Kill(phase, draw.random(), draw.randrange(10), targets, number, stopped)


def carry_out(pair: Pair, kills: list[Kill]) -> tuple[list[tuple[str, Kill]], str]:
    """(each kill with the phase it really hit, what went wrong or nothing)."""
    done: list[tuple[str, Kill]] = []
    for kill in kills:
        hits: list[int] = []
        while not hits:  # one that has just ended by itself is waited for again
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
    """Until both processes are there and the run is where the kill wants it; or what went wrong."""
    wish = kill.phase
    if wish == STORE and pair.built():
        wish = START
    if wish == START and pair.phase() != START:  # a stop so short that nothing started again
        wish = STEPS

    def there() -> bool:
        return pair.phase() in (wish, END) and None not in pair.pids()

    if problem := until(pair, there):
        return problem
    if wish == STEPS:
        later = pair.step + kill.steps
        if problem := until(pair, lambda: pair.step >= later or pair.phase() in (START, END)):
            return problem
    # After the last step comes an evaluation: killed before its end, it comes once more.
    span = EVALUATION if pair.phase() == END else pair.phase()
    time.sleep(kill.moment * pair.seconds.get(span, 0.0))
    return ""


def wait_for_others(pair: Pair, before: list[int | None], who: tuple[int, ...]) -> str:
    """Until other processes run in place of those before; or what went wrong."""

    def replaced() -> bool:
        now, codes = pair.pids(), pair.codes()
        return all(codes[i] == 0 or now[i] not in (None, before[i]) for i in who)

    return until(pair, replaced)


def until_the_end(pair: Pair) -> str:
    """Until both supervisors have ended; or what went wrong."""
    return until(pair, lambda: False)


def until(pair: Pair, condition: Callable[[], bool]) -> str:
    """Until the condition holds or both processes have come to their end; or what went wrong."""
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
    """Kills by phase and signal, and what became of the processes."""
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
