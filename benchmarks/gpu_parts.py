"""What benchmarks/gpu.py measures: one function a part, which makes its jobs."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.jobs import Job

AXES = ("data", "fsdp", "expert")
# A fixed table from token ids to experts, on random ids: no GPU gets 1% more than another.
EVEN = ("--config.model.moe.router=hash", "--random")
EXPERTS_SMALL = ("--shapes=small", "--experts=8")


@dataclasses.dataclass(frozen=True)
class Given:
    """What the parts are made with."""

    configs: tuple[str, ...]
    batches: tuple[int, ...]  # rows a GPU
    batch: int  # of the parts that compare one thing
    steps: int
    overrides: tuple[str, ...]  # of every config
    small: bool
    scratch: Path  # for the text and for compiled programs; was empty when this began


@dataclasses.dataclass(frozen=True)
class Step(Job):
    """Whole steps by `moe_jax bench`; `against` names the job whose tokens/s are the unit."""

    against: str = ""


def jobs_of(names: Iterable[str], given: Given) -> list[Job]:
    """Jobs of the parts, those that two of them share once."""
    return list({job.name: job for name in names for job in PARTS[name](given)}.values())


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", name, *arguments


def text(given: Given) -> Job:
    """Tokenises the corpus, so that nobody's first step waits for it."""
    return Job("text", (module("moe_jax", "data", *_config(given, given.configs[0])),))


def conformance(given: Given) -> list[Job]:
    """Every router on every dispatch path, against the float64 oracle."""
    if given.small:  # minutes on a CPU; the tests run it there
        return []
    return [Job("conformance", (module("moe_jax", "doctor", "--conformance"),))]


def numerics(given: Given) -> list[Job]:
    """Training in bfloat16 beside float32."""
    return [] if given.small else [Job("numerics", (module("benchmarks.numerics"),))]


def float8(given: Given) -> list[Job]:
    """Products and rounding, steps beside those in bfloat16, and the losses of 300 steps."""
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
    """Whether a resumed run is the one that was never stopped, bit for bit."""
    if given.small:
        return []
    return [Job("bitwise", (module("benchmarks.deterministic", "--bench="),))]


def grouped_matmul(given: Given) -> list[Job]:
    """Checks every leg of the grouped matmuls, then times them."""
    small = ("--rest=0", "--implementations=tiled") if given.small else ()
    return [Job("grouped_matmul", (module("benchmarks.grouped_matmul", *small),))]


def moe_layer(given: Given) -> list[Job]:
    """One layer, forward and backward."""
    small = ("--shapes=small", "--dispatch=dropless") if given.small else ()
    return [Job("moe_layer", (module("benchmarks.moe_layer", *small),))]


def expert_counts(given: Given) -> list[Job]:
    """One layer at 8 to 256 experts, with the optimizer beside."""
    small = EXPERTS_SMALL if given.small else ()
    return [
        Job(
            f"expert_counts-{path}",
            (module("benchmarks.expert_counts", f"--dispatch={path}", *small),),
        )
        for path in ("dropless", "capacity")
    ]


def step(given: Given) -> list[Job]:
    """Both dispatch paths at every batch."""
    return _both_paths(given)


def even(given: Given) -> list[Job]:
    """The same with an even load, of which capacity 1.25 drops nothing."""
    return _both_paths(given, *EVEN, also="even")


def peers(given: Given) -> list[Job]:
    """Hugging Face's step and ours in turn (needs torch and transformers)."""
    if given.small:  # on a CPU our own environment holds no torch
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
    """Kernels that repeat bit for bit, beside those that need not."""
    return _variant(given, "deterministic", "--config.train.deterministic=true")


def confined(given: Given) -> list[Job]:
    """Attention that stops at document borders, beside plain causal."""
    return _variant(given, "confined", "--config.model.confine_attention=true")


def two(given: Given) -> list[Job]:
    """Two GPUs in each way beside one with as many rows, and one with all rows, for its loss.

    On random tokens, whose load is more even than that of text.  An untrained router's own load
    still makes one GPU wait for the other, so experts have a line with an even load, too.
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
    """The first step, cold and then with the compile cache that the cold one has written."""
    jobs = []
    for config in given.configs:
        name = f"start-{_stem(config)}"
        dropless = "--config.model.moe.dispatch=dropless"
        once = module("moe_jax", "bench", *_config(given, config), "--steps=1", dropless)
        env = {"JAX_COMPILATION_CACHE_DIR": str(given.scratch / name)}
        jobs.append(Job(name, (once, once), alone=True, env=env))
    return jobs


def olmoe(given: Given) -> list[Job]:
    """The whole OLMoE-1B-7B on one GPU: batches and remat policies that fit 141 GB."""
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
    """A job of whole steps with `batch` rows a GPU; `also` tells its name from others'."""
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
    """One thing changed, beside the same step without."""
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
