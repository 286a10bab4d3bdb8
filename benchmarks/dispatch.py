"""Times every dispatch path at several numbers of experts, and prints a Markdown table.

    python benchmarks/dispatch.py [--steps=5]

Each cell is a process of `python -m moe_jax bench` on configs/cpu_small.py with 16 rows of 128
bytes.  The active FLOPs are the same at every number of experts E, and routing groups have 16 E
tokens, so that an expert has 32 tokens per group on average at every E.  Run it on an otherwise
idle machine; `dense` at 128 experts takes minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "cpu_small.py"
EXPERTS = (8, 32, 128)
PATHS = ("capacity", "dropless", "einsum", "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    print("| dispatch | " + " | ".join(f"E={e}" for e in EXPERTS) + " |")
    print("|---|" + "---|" * len(EXPERTS))
    for path in PATHS:
        cells = [time_one(path, experts, steps) for experts in EXPERTS]
        print(f"| `{path}` | " + " | ".join(cells) + " |", flush=True)


def time_one(path: str, experts: int, steps: int) -> str:
    """The milliseconds of the whole step, and of the forward and backward pass alone."""
    command = [
        *(sys.executable, "-m", "moe_jax", "bench", f"--config={CONFIG}:{experts}"),
        f"--steps={steps}",
        "--gradients",
        "--config.data.sequence_length=128",
        "--config.train.batch_size=16",
        f"--config.model.moe.group_rows={experts // 8}",
        f"--config.model.moe.dispatch={path}",
    ]
    env = {"JAX_PLATFORMS": "cpu", **os.environ}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return "failed"
    row = json.loads(done.stdout)
    return f"{row['step_ms']:,.0f} ({row['forward_backward_ms']:,.0f})"


if __name__ == "__main__":
    main()
