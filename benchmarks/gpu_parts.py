"""The parts of benchmarks/gpu.py: one function per part, which makes its jobs."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.jobs import Job

AXES = ("data", "fsdp", "expert")
# A fixed table from token ids to experts, on random ids: the GPUs' loads differ by less than 1%.
EVEN = ("--config.model.moe.router=hash", "--random")
EXPERTS_SMALL = ("--shapes=small", "--experts=8")


@dataclasses.dataclass(frozen=True)
class Given:
    """The settings of the parts."""

    configs: tuple[str, ...]
    batches: tuple[int, ...]  # rows per GPU
    batch: int  # rows per GPU in parts that use one batch size
    steps: int
    overrides: tuple[str, ...]  # for every config
    small: bool
    scratch: Path  # for tokenised text and compiled programs; empty at the start


@dataclasses.dataclass(frozen=True)
class Step(Job):
    """Whole steps by `moe_jax bench`; `against` names the job to compare tokens/s with."""

    against: str = ""


def jobs_of(names: Iterable[str], given: Given) -> list[Job]:
    """Make the jobs of the parts; a job that two parts share runs once."""
    return list({job.name: job for name in names for job in PARTS[name](given)}.values())


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", name, *arguments


def text(given: Given) -> Job:
    """Tokenises the corpus, so that no job's first step waits for it."""
    return Job("text", (module("moe_jax", "data", *_config(given, given.configs[0])),))


def conformance(given: Given) -> list[Job]:
    """Compares every router on every dispatch path with the float64 oracle."""
    if given.small:  # it takes minutes on a CPU, and the tests cover it
        return []
    return [Job("conformance", (module("moe_jax", "doctor", "--conformance"),))]


def numerics(given: Given) -> list[Job]:
    """Compares training in bfloat16 with float32."""
    return [] if given.small else [Job("numerics", (module("benchmarks.numerics"),))]


def float8(given: Given) -> list[Job]:
    """Times float8 matmuls, rounding and steps beside bfloat16, and compares 300 steps' losses."""
    if given.small:
        return [Job("float8", (module("benchmarks.float8", "--small"),))]
    jobs = [
        Job("float8", (module("benchmarks.float8"),)),
        Job("numerics-float8", (module("benchmarks.numerics", "--float8"),)),
    ]
    for config in given.configs:
        for batch in given.batches:
            plain = bench(given, config, batch)
            own = "--config.model.moe.matmul=float8"
            jobs += [plain, bench(given, config, batch, own, also="float8", against=plain.name)]
    return jobs


def bitwise(given: Given) -> list[Job]:
    """Checks that a resumed run equals an uninterrupted one bit for bit."""
    if given.small:
        return []
    return [Job("bitwise", (module("benchmarks.deterministic", "--bench="),))]


def grouped_matmul(given: Given) -> list[Job]:
    """Checks the three matmuls of the grouped matmul, then times them."""
    small = ("--rest=0", "--implementations=tiled") if given.small else ()
    return [Job("grouped_matmul", (module("benchmarks.grouped_matmul", *small),))]


def moe_layer(given: Given) -> list[Job]:
    """Times one layer, forward and backward."""
    small = ("--shapes=small", "--dispatch=dropless") if given.small else ()
    return [Job("moe_layer", (module("benchmarks.moe_layer", *small),))]


def expert_counts(given: Given) -> list[Job]:
    """Times one layer and its optimizer at 8 to 256 experts."""
    small = EXPERTS_SMALL if given.small else ()
    return [
        Job(
            f"expert_counts-{path}",
            (module("benchmarks.expert_counts", f"--dispatch={path}", *small),),
        )
        for path in ("dropless", "capacity")
    ]


def step(given: Given) -> list[Job]:
    """Times whole steps of both dispatch paths at every batch."""
    return _both_paths(given)


def even(given: Given) -> list[Job]:
    """Times the same whole steps with a balanced load: capacity factor 1.25 drops nothing."""
    return _both_paths(given, *EVEN, also="even")


def peers(given: Given) -> list[Job]:
    """Times Hugging Face's step and ours in turn (needs torch and transformers)."""
    if given.small:  # our own environment on a CPU has no torch
        return []
    return [
        Job(f"peers-{_stem(config)}-{batch}", (_peer(config, batch, given.steps),))
        for config in given.configs
        for batch in given.batches
    ]


def _peer(config: str, batch: int, steps: int) -> tuple[str, ...]:
    own = f"--configs={config}", f"--batches={batch}", f"--steps={steps}", "--rounds=1"
    return module("benchmarks.peers.compare", *own)


def deterministic(given: Given) -> list[Job]:
    """Times deterministic kernels beside the default ones."""
    return _variant(given, "deterministic", "--config.train.deterministic=true")


def confined(given: Given) -> list[Job]:
    """Times attention confined to documents beside plain causal attention."""
    return _variant(given, "confined", "--config.model.confine_attention=true")


def two(given: Given) -> list[Job]:
    """Times two GPUs per mesh axis beside one GPU with the same rows per GPU.

    One GPU with all rows gives the loss to compare.  Random tokens are used, because they load the
    experts more evenly than text.  The load of an untrained router still makes one GPU wait for the
    other, so the expert axis is also timed with a balanced load.
    """
    jobs = []
    for config in given.configs:
        for load, own, axes in (("random", ("--random",), AXES), ("even", EVEN, ("expert",))):
            one = bench(given, config, given.batch, *own, also=load)
            jobs += [one, bench(given, config, 2 * given.batch, *own, also=load)]
            for axis in axes:
                mesh = (*own, f"--config.mesh.{axis}=2")
                also = f"{axis}-{load}"
                jobs.append(
                    bench(given, config, given.batch, *mesh, also=also, devices=2, against=one.name)
                )
    return jobs


def start(given: Given) -> list[Job]:
    """Times the first step, cold and then with the compile cache that the cold run wrote."""
    jobs = []
    for config in given.configs:
        name = f"start-{_stem(config)}"
        dropless = "--config.model.moe.dispatch=dropless"
        once = module("moe_jax", "bench", *_config(given, config), "--steps=1", dropless)
        env = {"JAX_COMPILATION_CACHE_DIR": str(given.scratch / name)}
        jobs.append(Job(name, (once, once), alone=True, env=env))
    return jobs


def olmoe(given: Given) -> list[Job]:
    """Times the whole OLMoE-1B-7B on one GPU: batches and remat policies that fit 141 GB."""
    if given.small:
        return []
    config = "configs/olmoe_1b_7b.py"
    shared = ("--config.mesh.expert=1", "--config.model.scan_layers=False")
    jobs = [
        bench(given, config, batch, *shared, f"--config.model.remat={remat}", also=remat)
        for batch, remat in ((8, "save_dispatch"), (16, "full"), (32, "full"))
    ]
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    memory = {name: os.environ.get(name, ".95")}
    return [dataclasses.replace(job, env=memory) for job in jobs]


PARTS: dict[str, Callable[[Given], list[Job]]] = {
    part.__name__: part
    for part in (
        conformance,
        numerics,
        bitwise,
        grouped_matmul,
        moe_layer,
        expert_counts,
        step,
        even,
        peers,
        deterministic,
        confined,
        float8,
        olmoe,
        two,
        start,
    )
}


def bench(
    given: Given,
    config: str,
    batch: int,
    *overrides: str,
    dispatch: str = "dropless",
    also: str = "",
    devices: int = 1,
    against: str = "",
) -> Step:
    """Make a job of whole steps with `batch` rows per GPU; `also` makes its name unique."""
    each = f"{batch}x{devices}" if devices > 1 else f"{batch}"
    name = "-".join(filter(None, (_stem(config), dispatch, each, also)))
    virtual = (f"--devices={devices}",) if given.small and devices > 1 else ()
    command = module(
        "moe_jax",
        "bench",
        *_config(given, config),
        f"--steps={given.steps}",
        "--profile",
        f"--config.train.batch_size={batch * devices}",
        f"--config.model.moe.dispatch={dispatch}",
        *overrides,
        *virtual,
    )
    return Step(name, (command,), devices=devices, against=against)


def _both_paths(given: Given, *own: str, also: str = "") -> list[Job]:
    jobs = []
    for config in given.configs:
        for batch in given.batches:
            plain = bench(given, config, batch, *own, also=also)
            capacity = bench(
                given, config, batch, *own, dispatch="capacity", also=also, against=plain.name
            )
            jobs += [plain, capacity]
    return jobs


def _variant(given: Given, also: str, override: str) -> list[Job]:
    """Make jobs of the default step and of the step with one override."""
    jobs = []
    for config in given.configs:
        plain = bench(given, config, given.batch)
        changed = bench(given, config, given.batch, override, also=also, against=plain.name)
        jobs += [plain, changed]
    return jobs


def _config(given: Given, config: str) -> tuple[str, ...]:
    return f"--config={config}", f"--workdir={given.scratch / 'text'}", *given.overrides


def _stem(config: str) -> str:
    return Path(config).stem.removeprefix("bench_")
