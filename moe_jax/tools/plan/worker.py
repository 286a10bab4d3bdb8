"""Compiles the plan in FOLDER/config.json; compiled.py starts it.

python -m moe_jax.tools.plan.worker FOLDER TOPOLOGY SAVE CONFIG
CONFIG is the command's config file, which registers its routers and dispatch paths; empty: none.
It is a separate process, because XLA can be stopped only by killing its process.
"""

import json
import sys
from pathlib import Path

import jax

from moe_jax.config import read_config
from moe_jax.config_file import read_config_file
from moe_jax.tools.plan.lowering import lower, make_plan
from moe_jax.tools.plan.saved import save_step
from moe_jax.tools.plan.topology import compile_devices, parse_topology


def main(folder: str, name: str, save: str, config_file: str) -> None:
    """Compile and write FOLDER/result.json, unless compiled.py kills the process before."""
    # A program from the compilation cache has no dumps and may not be saved again.
    jax.config.update("jax_enable_compilation_cache", False)
    topology = parse_topology(name)
    if topology.chip.torus:
        jax.config.update("jax_platforms", "cpu")  # the devices come from the topology
    if config_file:
        read_config_file(config_file)
    plan = make_plan(read_config(Path(folder, "config.json")), topology.num_devices)
    devices, _ = compile_devices(topology)
    executable = lower(plan, devices).compile()
    memory = executable.memory_analysis()
    assert memory is not None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = {
        "peak": memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
        "digest": save_step(executable, save) if save else "",
    }
    Path(folder, "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
