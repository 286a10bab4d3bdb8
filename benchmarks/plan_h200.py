"""Compares the measured memory and step time of one GPU with the planner's.

    python benchmarks/plan_h200.py [--topology=h200:1] [--steps=20]

Prints two rows of the table in docs/planning.md.  Each measurement and each plan is a separate
process, because the peak memory is counted per process.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("bench_mixtral_2b", "bench_olmoe_half")


def output(*arguments: str) -> str:
    """Run `python -m ARGUMENTS` and return its standard output; its progress stays on stderr."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def gib(text: str, name: str) -> float | None:
    """The figure in a line of the plan, in GiB; None: there is no such line."""
    found = re.search(rf"^  {name} +([\d.]+) (MiB|GiB)", text, re.M)
    return float(found[1]) / (1024 if found[2] == "MiB" else 1) if found else None


def main(argv: list[str]) -> None:
    given = dict(argument.removeprefix("--").split("=") for argument in argv)
    topology, steps = given.get("topology", "h200:1"), given.get("steps", "20")
    print("| config | peak memory, measured | analytic | XLA | step, measured | bound |")
    print("|---|---|---|---|---|---|")
    for name in CONFIGS:
        config = f"--config=configs/{name}.py"
        row = json.loads(output("moe_jax", "bench", config, f"--steps={steps}").splitlines()[-1])
        plan = output("moe_jax", "plan", config, f"--topology={topology}")
        measured = row["peak_memory_mib"] / 1024
        analytic, compiled = gib(plan, "total"), gib(plan, "compiled")
        bound = re.search(r"roofline: ([\d.,]+) ms", plan)
        assert analytic is not None and bound is not None, plan
        xla = "-" if compiled is None else f"{compiled:.2f} ({compiled / measured - 1:+.1%})"
        print(
            f"| {name} | {measured:.2f} GiB | {analytic:.2f} ({analytic / measured - 1:+.1%}) "
            f"| {xla} | {row['step_ms']} ms | {bound[1]} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
