"""The table of commands: `python -m moe_jax NAME ...` and `moe-NAME ...` are the same.

Nothing here imports JAX, so that --help is fast.  The module `moe_jax.cli.NAME` holds the command's
`main(argv)`.
"""

import dataclasses
import functools
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from moe_jax.cli import streams
from moe_jax.errors import UserError
from moe_jax.registry import suggest


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command; its type is the type of its default.

    Attributes:
      name: the name without dashes.
      default: the value if the flag is not given.
      help: one line for --help.
      path: True: the value is a file or folder name, in which a leading `~` is expanded.
    """

    name: str
    default: str | int | float | bool
    help: str
    path: bool = False


@dataclasses.dataclass(frozen=True)
class Command:
    """The arguments of one command, in addition to --workdir and --devices.

    Attributes:
      summary: one line for --help.
      flags: the command's own flags.
      config: True: it takes --config=FILE.py[:ARG] and --config.a.b=VALUE.
      workdir: True: --workdir is required; False: optional; None: ignored and not in --help.
      listed: True: `python -m moe_jax --help` shows it; False: only programs start it.
    """

    summary: str
    flags: tuple[Flag, ...] = ()
    config: bool = True
    workdir: bool | None = True
    listed: bool = True


HELP = {"--help", "-h"}
COMMON_FLAGS = (
    Flag("workdir", "", "Directory of the run.", path=True),
    Flag("devices", 0, "Run on this many virtual CPU devices; 0: use the real devices."),
)
# The arguments of `distributed.start`, for commands that may run as several processes.
PROCESS_FLAGS = (
    Flag("coordinator", "", "HOST:PORT of process 0, for several processes started by hand."),
    Flag("process_count", 0, "Number of processes; 0: from the environment; 1: ignore it."),
    Flag("process_id", -1, "Index of this process, from 0."),
)
# For commands that read a run's config.json: it may name a component that only this file registers.
REGISTRATIONS = Flag(
    "config", "", "FILE.py[:ARG] that registers the runs' own router or dispatch path; it is run."
)

COMMANDS = {
    "train": Command(
        "Train a config, or resume from the newest checkpoint of its workdir.",
        (
            Flag(
                "init_from",
                "",
                "Start a new run from the weights of the run in this workdir.",
                path=True,
            ),
            *PROCESS_FLAGS,
        ),
    ),
    "data": Command(
        "Build and describe the token store of a config; data train-bpe trains a tokenizer.",
        workdir=False,
    ),
    "checkpoint": Command(
        "List the checkpoints of a run.",
        (Flag("verify", False, "Read every byte; exit code 1 if a step is bad."),),
        config=False,
    ),
    "bench": Command(
        "Measure how fast a config trains on the devices at hand.",
        (
            Flag("steps", 20, "Steps to time, after a warm-up."),
            Flag("gradients", False, "Also time the forward and backward pass alone."),
            Flag("random", False, "Train on random tokens instead of the config's text."),
            Flag("profile", False, "Also show the device time by kind of kernel, from a trace."),
        ),
        workdir=False,
    ),
    "plan": Command(
        "Predict the memory and speed of a config on a topology, without the devices.",
        (
            Flag("topology", "", "The devices to plan for: v5p:8x8x16, v5e:4x4, h200:8."),
            Flag("mesh", "", "data=1,fsdp=128,expert=8,tensor=1, instead of the config's mesh."),
            Flag("tokens", 1e12, "Tokens of the whole training, for chip-hours."),
            Flag(
                "save", "", "Write the compiled executable here; takes minutes longer.", path=True
            ),
            Flag("search", False, "Rank every legal mesh, remat policy and batch size."),
            Flag("scaling", False, "Print a table from 8 to 65,536 chips, without compiling."),
            Flag("compile", True, "Compile; --nocompile prints the analytic estimate alone."),
        ),
        workdir=None,
    ),
    "doctor": Command(
        "Check a config on the devices at hand before chip-hours are spent on it.",
        (
            Flag("conformance", False, "Check every router, dispatch path and mesh instead."),
            Flag("full", False, "With --conformance: all combinations, not only all pairs."),
            Flag("steps", 0, "Also train this many steps, such as 30, and judge the load; 0: off."),
            *PROCESS_FLAGS,
        ),
        workdir=False,
    ),
    "results": Command(
        "Show a table, a CSV file and a plot of the runs below a folder.",
        (
            Flag("csv", "", "Also write the table of runs here, with all digits.", path=True),
            Flag(
                "plot",
                "",
                "Also plot (PNG, SVG or PDF by the name's end); needs matplotlib.",
                path=True,
            ),
            Flag("x", "", "Config key for the plot's right panel, such as model.moe.num_experts."),
            Flag(
                "compare",
                "",
                "Show speed-ups until the final held-out loss of the run in this folder.",
                path=True,
            ),
            Flag("fit", "", "Fit a scaling law to the finished runs: clark, joint or chinchilla."),
            Flag("fit_e_start", 1.847, "With --fit: E_start, the effective experts of E=1."),
            Flag("fit_e_max", 314.478, "With --fit: E_max, the limit of effective experts."),
            REGISTRATIONS,
        ),
        config=False,
    ),
    "goodput": Command(
        "Show how a run spent its time, including restarts and lost steps.",
        (
            Flag("json", False, "Print one line of JSON instead of tables."),
            Flag(
                "plot",
                "",
                "Also plot (PNG, SVG or PDF by the name's end); needs matplotlib.",
                path=True,
            ),
        ),
        config=False,
    ),
    "ledger": Command(
        "Show the outcomes of a run's assignments by layer, expert, position and source.",
        (
            Flag("layer", -1, "Only this MoE layer, counted from 0; -1: the sum of all layers."),
            Flag("from_step", 0, "Leave out earlier steps."),
            Flag(
                "csv",
                "",
                "Also write every count here: axis, layer, name and the outcomes.",
                path=True,
            ),
        ),
        config=False,
    ),
    "replay": Command(
        "Repeat one step of a run and compare it bit for bit with the log.",
        (
            Flag("step", 0, "The step, counted from 1 as in metrics.jsonl."),
            Flag("flight", True, "Use the flight record of the step; --noflight: the log."),
            Flag("from_beginning", False, "Start at step 0 if no checkpoint is early enough."),
            Flag("init_from", "", "With --from_beginning: the run's own --init_from.", path=True),
            REGISTRATIONS,
            *PROCESS_FLAGS,
        ),
        config=False,
    ),
    "check": Command(
        "Check many runs: each line of standard input is a JSON list of train's arguments.",
        config=False,
        workdir=None,
        listed=False,
    ),
}
TRAIN_BPE = Command(
    "Train a BPE tokenizer on a config's corpus.",
    (
        Flag("vocab_size", 0, "Tokens in the new vocabulary, including special tokens."),
        Flag("output", "", "The tokenizer.json to write.", path=True),
    ),
    workdir=None,
)


def run_command(name: str, arguments: Sequence[str]) -> NoReturn:
    """Run one command with the arguments after its name, and exit with its code."""
    program = f"moe_jax {name}"
    if HELP & set(arguments):
        bpe = name == "data" and "train-bpe" in arguments
        command = TRAIN_BPE if bpe else COMMANDS[name]
        text = help_text(f"{name} train-bpe" if bpe else name, command)
        if not any(argument.partition("=")[0] in ("--config", "-config") for argument in arguments):
            _show(text)
        left_out = HELP | ({"train-bpe"} if bpe else set())
        rest = [argument for argument in arguments if argument not in left_out]
        optional = dataclasses.replace(command, workdir=None if command.workdir is None else False)
        _run(functools.partial(_main_of("help"), text, optional), [program, *rest])
    _run(_main_of(name), [program, *arguments])


def _run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> NoReturn:
    from moe_jax.cli.exit import run

    run(main, argv)


def script() -> NoReturn:
    """Entry point of the console commands: moe-train runs `train`, and so on."""
    streams.guard()
    name = os.path.basename(sys.argv[0]).removesuffix(".exe").removeprefix("moe-")
    run_command(name, sys.argv[1:])


def main() -> NoReturn:
    """Entry point of `python -m moe_jax NAME ARGUMENTS`."""
    streams.guard()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        _show(overview())
    if name not in COMMANDS:
        shown = [name for name, command in COMMANDS.items() if command.listed]
        near = suggest(name, [*shown, "data train-bpe"])
        error = UserError(f"{name!r} is not a command of moe_jax{near}.")
        if name.startswith("-"):
            error = UserError(f"There is no command before {name}: use one of {', '.join(shown)}.")
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    run_command(name, arguments)


def _main_of(name: str) -> Callable[..., int | None]:
    """Import the command only when it runs, so that an interrupt is handled as one during it."""

    def main(*given: Any) -> int | None:
        # Imported modules are never freed, so garbage collection need not search their objects.
        # Without it, importing `train` takes 2.3 instead of 3.0 s of CPU time; frozen, tracing and
        # lowering bench_olmoe_half take 1.4 instead of 1.6 s (2 cores, jax 0.10.2).
        gc.disable()
        try:
            command = importlib.import_module(f"moe_jax.cli.{name}")
            gc.freeze()
        finally:
            gc.enable()
        return command.main(*given)

    return main


def _show(text: str) -> NoReturn:
    """Print a help text and exit."""
    try:
        print(text)
        streams.finish()
        code = 0
    except streams.OutputLostError as lost:
        code = lost.tell()
    sys.exit(code)


def overview() -> str:
    """The text of `python -m moe_jax --help`: every listed command with its summary."""
    lines = ["usage: python -m moe_jax COMMAND [--FLAG=VALUE ...]", ""]
    lines += [f"  {n:<11} {c.summary}" for n, c in COMMANDS.items() if c.listed]
    return "\n".join([*lines, "", "python -m moe_jax COMMAND --help lists a command's flags."])


def help_text(name: str, command: Command) -> str:
    """The text of `python -m moe_jax NAME --help`: summary and flags with their defaults."""
    lines = [f"usage: python -m moe_jax {name} [--FLAG=VALUE ...]", "", command.summary, ""]
    if command.config:
        lines += [
            "  --config=FILE.py[:ARG]  config file",
            "  --config.KEY=VALUE      override one key of the config: --config.train.steps=9",
        ]
    unused = {"workdir"} if command.workdir is None else set()
    flags = [flag for flag in (*COMMON_FLAGS, *command.flags) if flag.name not in unused]
    lines += [f"  --{f.name}={f.default!r}  {f.help}" for f in flags]
    if command.config:
        lines += ["", "With --config=FILE, --help also lists the keys of that config file."]
    return "\n".join(lines)
