"""Times the Hugging Face peer and ours in turn, and prints the ratio of their best batches.

    python -m benchmarks.peers.compare [--batches=4,8,16] [--rounds=3] [--gpus=1]
        [--python-peer=.../bin/python] [--config.KEY=VALUE]

Peer and ours alternate at every batch, and each measurement is a separate process.  Before and
after each round a plain 8192^3 matmul is timed, to show the chip's speed at that time.  Figures are
medians over the rounds of the medians over steps; `ratio` is of model TFLOP/s, counted by
`moe_jax.model.flops` on both sides.  `--narrow` repeats only the best batches of the first round.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.jobs import end_with_children, last_json, run
from moe_jax.files.formats import table

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("configs/bench_mixtral_2b.py", "configs/bench_olmoe_half.py")
SMALL = ("configs/tiny.py", "--config.model.vocab_size=512", "--config.data.sequence_length=64")
SIDES = ("peer", "ours")


class Result(NamedTuple):
    """The result of one process."""

    config: str
    side: str
    batch: int  # rows per GPU
    row: Mapping[str, Any] | None  # None: the process failed


def main() -> None:
    given, overrides = parse(sys.argv[1:])
    end_with_children()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.logs or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results, matmuls = measure(given, overrides, environment(given.gpus, scratch), folder)
    print(f"\nplain matmul around the rounds, TFLOP/s: {', '.join(matmuls)}\n")
    print(table(summary(results), left=1))
    if not all(best(results, config, side) for config in given.configs for side in SIDES):
        sys.exit(1)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse our flags, and the config overrides for both sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", type=lambda text: text.split(","), default=[*CONFIGS])
    parser.add_argument("--batches", type=numbers, default=[4, 8], help="rows per GPU: 4,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--narrow", action="store_true", help="later rounds: the best batches only")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per process")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, data parallel")
    parser.add_argument("--dispatch", default="dropless", help="ours: dropless or capacity")
    parser.add_argument("--python-peer", default=sys.executable, help="has torch and transformers")
    parser.add_argument("--python-ours", default=sys.executable, help="has what moe_jax needs")
    parser.add_argument("--limit", type=float, default=400, help="time limit in seconds")
    parser.add_argument("--logs", default="", help="folder for the processes' output")
    parser.add_argument("--small", action="store_true", help="a tiny model, to run on a CPU")
    given, overrides = parser.parse_known_args(argv)
    stray = [argument for argument in overrides if not argument.startswith("--config.")]
    if stray:
        parser.error(f"{stray[0]!r} is not a flag")
    if given.small:
        given.configs, overrides = [SMALL[0]], [*SMALL[1:], *overrides]
    given.configs = [
        path if Path(path).is_absolute() else f"{ROOT / path}" for path in given.configs
    ]
    return given, overrides


def numbers(text: str) -> list[int]:
    """Parse the numbers of a flag such as 4,8,16."""
    return [int(part) for part in text.split(",")]


def environment(gpus: int, scratch: str) -> dict[str, str]:
    """The environment of every process: the first `gpus` GPUs, and one compile cache."""
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": f"{scratch}/cache",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # JAX leaves a quarter unused, torch nothing
        "NCCL_NVLS_ENABLE": "0",
    }
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **defaults,
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:gpus]),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def measure(
    given: argparse.Namespace, overrides: Sequence[str], env: Mapping[str, str], folder: Path
) -> tuple[list[Result], list[str]]:
    """Measure: every process's result, and the matmuls before, between and after the rounds."""
    results: list[Result] = []
    matmuls = [matmul(given, env, folder)]
    for number in range(given.rounds):
        for config in given.configs:
            for side, batch in plan(results if given.narrow else [], config, given.batches):
                log = folder / f"{Path(config).stem}-{side}-{batch}-{number}"
                command = commands(given, config, batch, overrides)[side]
                error, output = run(command, env, given.limit, log)
                row = None if error else last_json(output)
                results.append(Result(config, side, batch, row))
                print(f"{side}, batch {batch}: {error or json.dumps(row)}", flush=True)
        matmuls.append(matmul(given, env, folder))
    return results, matmuls


def plan(results: Sequence[Result], config: str, batches: Sequence[int]) -> list[tuple[str, int]]:
    """List (side, batch) of a round, sides in turn: the best batches if known, else all."""
    known = {side: best(results, config, side) for side in SIDES}
    if any(known.values()):
        return [(side, found[0]) for side, found in known.items() if found]
    return [(side, batch) for batch in batches for side in SIDES]


def commands(
    given: argparse.Namespace, config: str, batch: int, overrides: Sequence[str]
) -> dict[str, list[str]]:
    """The command that measures each side."""
    shared = [f"--config={config}", f"--steps={given.steps}", *overrides]
    start = ["-m"]
    if given.gpus > 1:
        start += ["torch.distributed.run", f"--nproc_per_node={given.gpus}", "-m"]
    peer = [given.python_peer, *start, "benchmarks.peers.hf_step", *shared, f"--batch={batch}"]
    ours = [given.python_ours, "-m", "moe_jax", "bench", *shared]
    return {
        "peer": [*peer, f"--python-ours={given.python_ours}", *["--no-compile"] * given.small],
        "ours": [
            *ours,
            f"--config.train.batch_size={batch * given.gpus}",
            f"--config.model.moe.dispatch={given.dispatch}",
        ],
    }


def matmul(given: argparse.Namespace, env: Mapping[str, str], folder: Path) -> str:
    """Measure the chip's current speed with a plain matmul."""
    command = [given.python_ours, "-m", "benchmarks.timing"]
    error, output = run(command, env, given.limit, folder / "matmul")
    found = None if error else last_json(output)
    figure = f"{found['matmul_tflops_per_s']}" if found else f"failed ({error})"
    print(f"plain matmul: {figure} TFLOP/s", flush=True)
    return figure


def speeds(results: Sequence[Result], config: str, side: str) -> dict[int, float]:
    """Map batch -> median TFLOP/s over the rounds."""
    found: dict[int, list[float]] = {}
    for result in results:
        if (result.config, result.side) == (config, side) and result.row:
            found.setdefault(result.batch, []).append(result.row["model_tflops_per_s"])
    return {batch: statistics.median(values) for batch, values in found.items()}


def best(results: Sequence[Result], config: str, side: str) -> tuple[int, float] | None:
    """The (batch, TFLOP/s) of the fastest batch; None: all failed."""
    found = speeds(results, config, side)
    return max(found.items(), key=lambda item: item[1]) if found else None


def summary(results: Sequence[Result]) -> list[list[str]]:
    """Make the rows of the table: each config's batches, then its best ones."""
    rows = [
        ["config", "batch", "peer, ms", "TFLOP/s", "GiB", "ours, ms", "TFLOP/s", "GiB", "ratio"]
    ]
    for config in dict.fromkeys(result.config for result in results):
        of_config = [result for result in results if result.config == config]
        name = Path(config.split(":")[0]).stem
        for batch in sorted({result.batch for result in of_config}):
            here = [result for result in of_config if result.batch == batch]
            cells = [cell for side in SIDES for cell in _cells(here, side)]
            each = [speeds(here, config, side).get(batch) for side in SIDES]
            rows.append([name, f"{batch}", *cells, _ratio(*each)])
        found = [best(of_config, config, side) for side in SIDES]
        cells = [cell for one in found for cell in _best_cells(one)]
        rows.append([name, "best", *cells, _ratio(*(one and one[1] for one in found))])
    return rows


def _cells(results: Sequence[Result], side: str) -> list[str]:
    rows = [result.row for result in results if result.side == side and result.row]
    if not rows:
        failed = any(result.side == side for result in results)
        return ["failed" if failed else "-", "-", "-"]
    peak = rows[-1]["peak_memory_mib"]
    return [
        f"{statistics.median(row['step_ms'] for row in rows):.1f}",
        f"{statistics.median(row['model_tflops_per_s'] for row in rows):.4g}",
        f"{peak / 1024:.0f}" if peak else "-",
    ]


def _best_cells(found: tuple[int, float] | None) -> list[str]:
    return [f"batch {found[0]}", f"{found[1]:.4g}", ""] if found else ["failed", "-", "-"]


def _ratio(peer: float | None, ours: float | None) -> str:
    return f"{ours / peer:.2f}" if peer and ours else "-"


if __name__ == "__main__":
    main()
