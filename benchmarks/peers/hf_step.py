"""Times one MoE training step of a config in Hugging Face transformers; prints a line of JSON.

    python -m benchmarks.peers.hf_step --config=configs/bench_mixtral_2b.py [--batch=8]
    torchrun --nproc_per_node=2 -m benchmarks.peers.hf_step --config=... --batch=8

The step is forward, backward and AdamW of the model that `shape.py` makes of the config: experts by
`torch._grouped_mm`, scaled-dot-product attention, torch.compile, weights and both moments in the
config's precision, random tokens.  Under torchrun it is data parallel, `--batch` rows per GPU.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

try:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
except ImportError as error:
    sys.exit(
        f"Error: {error.name} is not installed in {sys.executable}: pip install torch "
        f"transformers, there or where --python-peer of compare.py points."
    )

WARMUP = 3  # steps before the timed ones; the first compiles


def main() -> None:
    given, overrides = parse(sys.argv[1:])
    shape = read_shape(given.python_ours, given.config, overrides)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if ranks > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(rank)

    model = make_model(shape, given.experts, device)
    step = make_step(model, shape, given, device, ranks)
    loss, seconds = timed(step, given.steps, device)
    if rank == 0:
        print(json.dumps(row(shape, given, loss, seconds, device, ranks)), flush=True)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse our flags, and the overrides of the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="FILE.py[:ARG]; also --config.KEY=VALUE")
    parser.add_argument("--batch", type=int, default=4, help="rows per GPU")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--experts", default="grouped_mm", help="experts_implementation")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--python-ours", default=sys.executable, help="where moe_jax is installed")
    given, rest = parser.parse_known_args(argv)
    stray = [argument for argument in rest if not argument.startswith("--config.")]
    if stray:
        parser.error(f"{stray[0]!r} is not a flag")
    return given, rest


def read_shape(python: str, config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run shape.py in a separate process, so that JAX reserves no GPU memory in this one."""
    command = [python, "-m", "benchmarks.peers.shape", f"--config={config}", *overrides]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # shape.py has printed the reason
    return json.loads(done.stdout)


def make_model(shape: dict[str, Any], experts: str, device: torch.device) -> Any:
    """Make the model with random weights; exit unless its number of parameters equals ours."""
    config = getattr(transformers, f"{shape['class']}Config")(**shape["model"])
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, shape["dtype"]),
            attn_implementation="sdpa",
            experts_implementation=experts,
        ).train()
    size = sum(p.numel() for p in model.parameters())
    if size != shape["params"]:
        sys.exit(f"Error: the peer's model has {size} parameters and ours {shape['params']}.")
    return model


def make_step(
    model: Any, shape: dict[str, Any], given: argparse.Namespace, device: torch.device, ranks: int
) -> Callable[[], Any]:
    """Make a training step on one batch of random tokens, which returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **shape["optimizer"])
    if ranks > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True
        )
    if given.compile:
        model = torch.compile(model)
    size = (given.batch, shape["sequence_length"])
    tokens = torch.randint(0, shape["model"]["vocab_size"], size, device=device)

    def step() -> Any:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def timed(step: Callable[[], Any], steps: int, device: torch.device) -> tuple[float, list[float]]:
    """Measure (last loss, seconds of each of `steps` steps by the GPU's clock)."""
    if device.type == "cpu":
        return _timed_on_cpu(step, steps)
    for _ in range(WARMUP):
        loss = step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        loss = step()
        mark.record()
    torch.cuda.synchronize()
    spans = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return loss.item(), [span / 1e3 for span in spans]


def _timed_on_cpu(step: Callable[[], Any], steps: int) -> tuple[float, list[float]]:
    times = []
    for _ in range(WARMUP + steps):
        began = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - began)
    return loss.item(), times[WARMUP:]


def row(
    shape: dict[str, Any],
    given: argparse.Namespace,
    loss: float,
    times: list[float],
    device: torch.device,
    ranks: int,
) -> dict[str, Any]:
    """Make the line of JSON, with the field names of `python -m moe_jax bench`."""
    cuda, seconds = device.type == "cuda", statistics.median(times)
    tokens = given.batch * shape["sequence_length"] * ranks
    return {
        "config": given.config,
        "step_ms": round(1e3 * seconds, 1),
        "tokens_per_s": round(tokens / seconds),
        "model_tflops_per_s": round(shape["flops_per_token"] * tokens / seconds / 1e12, 4),
        "peak_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else None,
        "loss": round(loss, 4),
        "params": shape["params"],
        "batch": given.batch,
        "devices": ranks,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
