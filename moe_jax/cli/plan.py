"""python -m moe_jax plan --config=... --topology=v5p:8x8x16: predict memory and speed."""

import math
import os
import re
import sys
import time
from collections.abc import Sequence

import jax

from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.config import Config, from_config_dict
from moe_jax.errors import UserError
from moe_jax.files import formats
from moe_jax.tools.plan import report
from moe_jax.tools.plan.analytic import estimate
from moe_jax.tools.plan.compiled import Compiled, compile_plan
from moe_jax.tools.plan.lowering import Plan, make_plan
from moe_jax.tools.plan.roofline import roofline
from moe_jax.tools.plan.saved import check_writable
from moe_jax.tools.plan.scaling import scaling
from moe_jax.tools.plan.search import mesh_text, plan_on_one_device, search
from moe_jax.tools.plan.topology import Topology, compile_devices, parse_topology
from moe_jax.tools.plan.work import executed_flops, moved_bytes, traffic

_SHOWN, _COMPILED = 10, 3  # number of layouts of a search to print, and to compile


def main(argv: Sequence[str]) -> int:
    """Print the plan; its last line says whether it fits."""
    parsed = parse(argv, COMMANDS["plan"])
    given = parsed.flags
    if not given.topology:
        raise UserError("--topology is missing: set one, such as v5p:8x8x16 or h200:8.")
    topology = parse_topology(given.topology)
    if topology.chip.torus:
        jax.config.update("jax_platforms", "cpu")  # the TPUs of the topology are not attached
    _check(given)
    if given.mesh:
        parsed.config.update({"mesh": _mesh(given.mesh)})
    if given.scaling:
        config = from_config_dict(parsed.config)
        for line in scaling(config, topology.name.partition(":")[0], usable_bytes(topology)):
            print(line, flush=True)
        return 0
    if given.search:
        return _search(from_config_dict(parsed.config), topology, given)
    plan = make_plan(from_config_dict(parsed.config), topology.num_devices)
    for line in report.describe_plan(plan, topology):
        print(line, flush=True)
    compiled = _compile(plan, topology, given)
    print(*_lines(plan, topology, compiled, given.tokens), sep="\n", flush=True)
    return 0


def _check(given) -> None:
    """Raise UserError for flags that exclude each other, or a file that cannot be written."""
    if not 0 < given.tokens < math.inf:
        raise UserError(f"--tokens={given.tokens:g}: give a finite number above 0.")
    if given.mesh and (given.search or given.scaling):
        raise UserError("--mesh fixes the layout, --search and --scaling try all: give one.")
    if given.save and (given.search or given.scaling or not given.compile):
        raise UserError("--save needs one compiled plan: remove --search, --scaling, --nocompile.")
    if given.save:
        check_writable(given.save)


def _search(config: Config, topology: Topology, given) -> int:
    """Print the best layouts, compile the first few, and say why the others were rejected."""
    usable = usable_bytes(topology)
    began = time.perf_counter()
    _progress("ranking every mesh, remat policy and batch size")
    ranking = search(plan_on_one_device(config), topology, usable)
    print(f"{topology.name}: {len(ranking.found):,} layouts fit, {len(ranking.rejected):,} do not")
    print(f"ranked in {time.perf_counter() - began:.0f} s by time per token, without overlap:")
    devices, how = compile_devices(topology)  # raises UserError for a slice that does not exist
    if not given.compile:
        devices, how = [], "--nocompile"
    verdicts: list[bool] = []  # of compiled layouts, which differ in mesh or remat
    seen: set[str] = set()
    for place, found in enumerate(ranking.found[:_SHOWN]):
        print(f"{place + 1:3}. {report.describe_found(found)}", flush=True)
        layout = f"{mesh_text(found.plan.config.mesh)} {found.plan.config.model.remat}"
        if devices and len(verdicts) < _COMPILED and layout not in seen:
            compiled = compile_plan(found.plan, topology, _progress, config_file=given.config)
            verdicts.append(compiled.peak <= usable)
            fits = "fits" if verdicts[-1] else "does not fit"
            print(f"     compiled: {formats.size(compiled.peak)}, {fits}", flush=True)
        seen.add(layout)
    if not devices:
        print(f"not compiled ({how}): every figure is an analytic estimate")
    for line in report.describe_rejected(ranking.rejected):
        print(line)
    print(f"fits: {'yes' if any(verdicts or [bool(ranking.found)]) else 'no'}")
    return 0


def _mesh(text: str) -> dict[str, int]:
    """Parse axis sizes such as data=2,expert=8; an axis that is not named has size 1."""
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not re.fullmatch("-?[0-9]{1,12}", size):
            raise UserError(f"--mesh={text}: write AXIS=SIZE,... with {', '.join(sizes)}.")
        if text.count(f"{axis}=") > 1:
            raise UserError(f"--mesh={text}: {axis} is there twice. Give it once.")
        sizes[axis] = int(size)
    return sizes


def _compile(plan: Plan, topology: Topology, given) -> Compiled | None:
    """Compile the plan; None if --nocompile is set or there are no devices to compile for."""
    if not given.compile:
        print("not compiled: every figure below is an analytic estimate")
        return None
    devices, how = compile_devices(topology)
    if not devices:
        print(f"not compiled ({how}): every figure below is an analytic estimate")
        return None
    compiled = compile_plan(plan, topology, _progress, config_file=given.config, save=given.save)
    print(f"compiled in {compiled.seconds:.0f} s: {how}")
    if given.save:
        if not compiled.digest:
            raise UserError(
                f"--save={given.save} was not written: XLA did not finish the program "
                f"({compiled.error or 'its process ended early'})."
            )
        print(f"saved {given.save} (SHA-256 {compiled.digest})")
    return compiled


def _lines(plan: Plan, topology: Topology, compiled: Compiled | None, tokens: float) -> list[str]:
    memory = estimate(plan)
    usable = usable_bytes(topology)
    collectives = None if compiled is None else compiled.collectives
    found = traffic(plan) if collectives is None else report.read_traffic(collectives, plan)
    how = "analytic" if collectives is None else "read from the compiled program"
    executed = executed_flops(plan)
    roof = roofline(plan, topology, executed, moved_bytes(plan), found)
    lines = [
        *report.describe_memory(memory, compiled, usable),
        *report.describe_traffic(found, how),
        *report.describe_speed(plan, topology, roof, executed, tokens),
    ]
    if compiled is not None and compiled.error:
        lines.append(f"XLA: {compiled.error}")
    needed = memory.total if compiled is None else compiled.peak
    return [*lines, f"fits: {'yes' if needed <= usable else 'no'}"]


def usable_bytes(topology: Topology) -> float:
    """The bytes of a device's memory that XLA can use: on a GPU, the share that JAX reserves."""
    if topology.chip.torus:
        return topology.chip.hbm
    return topology.chip.hbm * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
