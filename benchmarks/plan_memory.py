"""Compares the planner's analytic memory with XLA's for many configs and topologies.

    python benchmarks/plan_memory.py [--cache=FILE]

Prints a Markdown table.  It needs libtpu (the extra `plan`) but no TPU; each row takes about ten
seconds.  With --cache the compiled figures are kept in FILE (JSON), and only missing ones are
compiled.
"""

import json
import sys
from pathlib import Path

import jax

from moe_jax.cli.commands import Command
from moe_jax.cli.parse import parse
from moe_jax.config import from_config_dict
from moe_jax.tools.plan.analytic import estimate
from moe_jax.tools.plan.compiled import compile_plan
from moe_jax.tools.plan.lowering import make_plan
from moe_jax.tools.plan.topology import parse_topology

ROOT = Path(__file__).resolve().parents[1]

_CAPACITY = "--config.model.moe.dispatch=capacity"
PAIRS = (
    "mixtral_8x7b.py v5p:8x8x16",
    "mixtral_8x7b.py v5p:4x8x8",
    "mixtral_8x7b.py v5p:4x4x8 --config.train.accumulation=4",
    f"mixtral_8x7b.py v5p:8x8x16 {_CAPACITY} --config.model.remat=save_dispatch",
    "mixtral_8x7b.py v5p:4x8x8 --config.mesh.tensor=4",
    "mixtral_8x7b.py v5p:4x4x8 --config.mesh.expert=1 --config.model.remat=dots",
    "mixtral_8x7b.py v5p:8x8x16 --config.mesh.expert=4 --config.model.remat=save_hidden",
    "qwen3_30b_a3b.py v5p:8x8x16",
    f"qwen3_30b_a3b.py v6e:16x16 {_CAPACITY} --config.train.batch_size=256",
    "olmoe_1b_7b.py v5p:8x8x8 --config.mesh.data=8 --config.mesh.fsdp=8",
    f"olmoe_1b_7b.py v5p:4x8x8 {_CAPACITY} --config.mesh.data=1 --config.mesh.fsdp=-1",
    "switch_base.py v5e:4x4 --config.mesh.expert=16 --config.train.accumulation=4",
    "gshard.py v5p:4x4x4 --config.mesh.expert=64",
    "switch_c.py v5p:8x8x16 --config.mesh.expert=512",
    "bench_mixtral_2b.py v5p:2x2x1 --config.train.batch_size=16",
    "bench_olmoe_half.py v5p:2x2x1 --config.train.batch_size=16",
)


def main(argv: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    cache = Path(argv[0].removeprefix("--cache=")) if argv else None
    known = json.loads(cache.read_text()) if cache and cache.exists() else {}
    print("| config and overrides | topology | analytic, GiB | XLA, GiB | difference |")
    print("|---|---|---|---|---|")
    for pair in PAIRS:
        name, where, *overrides = pair.split()
        topology = parse_topology(where)
        arguments = ["plan", f"--config={ROOT / 'configs' / name}", *overrides]
        parsed = parse(arguments, Command("", workdir=False))
        plan = make_plan(from_config_dict(parsed.config), topology.num_devices)
        if pair not in known:
            file = parsed.flags.config
            known[pair] = compile_plan(plan, topology, lambda line: None, config_file=file).peak
            if cache:
                cache.write_text(json.dumps(known, indent=1))
        ours, xla = estimate(plan).total, known[pair]
        short = " ".join(
            [name.removesuffix(".py"), *(o.removeprefix("--config.") for o in overrides)]
        )
        sizes = f"{ours / 2**30:.2f} | {xla / 2**30:.2f} | {ours / xla - 1:+.1%}"
        print(f"| {short} | {where} | {sizes} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
