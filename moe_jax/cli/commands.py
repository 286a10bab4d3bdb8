"""The table of commands: `python -m moe_jax NAME ...` and `moe-NAME ...` are the same.

Nothing here imports JAX, so that --help answers at once.  The module `moe_jax.cli.NAME` holds the
command's `main(argv)`.
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
      name: without dashes.
      default: the value where it is not given.
      help: one line for --help.
      path: whether it names a file or a folder; `~` in front is then the home folder.
    """

    name: str
    default: str | int | float | bool
    help: str
    path: bool = False


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command takes beside --workdir and --devices.

    Attributes:
      summary: one line for --help.
      flags: its own flags.
      config: whether it takes --config=FILE.py[:ARG] and --config.a.b=VALUE.
      workdir: whether it needs --workdir; None: it makes nothing of one, and --help leaves it out.
      listed: whether `python -m moe_jax --help` shows it; False for what only programs start.
    """

    summary: str
    flags: tuple[Flag, ...] = ()
    config: bool = True
    workdir: bool | None = True
    listed: bool = True


HELP = {"--help", "-h"}
COMMON_FLAGS = (
    Flag("workdir", "", "Folder of the run.", path=True),
    Flag("devices", 0, "Run on this many virtual CPU devices; 0: the machine's own."),
)
# For commands that may run as several processes: what `distributed.start` takes.
PROCESS_FLAGS = (
    Flag("coordinator", "", "HOST:PORT of process 0, for several processes started by hand."),
    Flag("process_count", 0, "How many processes; 1 ignores what the environment says."),
    Flag("process_id", -1, "Which process this is, from 0."),
)
# For commands that read a run's own config.json, which names what only that file makes known.
REGISTRATIONS = Flag(
    "config", "", "FILE.py[:ARG] that registers the runs' own router or dispatch path; it is run."
)

COMMANDS = {
    "train": Command(
        "Train a config, or go on from the newest checkpoint of its workdir.",
        (
            Flag(
                "init_from",
                "",
                "Start a new run from the weights of this other run's workdir.",
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
            Flag("steps", 20, "Steps to time, after some that are not."),
            Flag("gradients", False, "Also time forward and backward alone."),
            Flag("random", False, "Train on random tokens instead of the config's text."),
            Flag("profile", False, "Also show where the device's time goes, from a trace."),
        ),
        workdir=False,
    ),
    "plan": Command(
        "Say what fits a topology and how fast it can go, without the devices.",
        (
            Flag("topology", "", "What it would run on: v5p:8x8x16, v5e:4x4, h200:8."),
            Flag("mesh", "", "data=1,fsdp=128,expert=8,tensor=1, instead of the config's."),
            Flag("tokens", 1e12, "Tokens of the whole training, for chip-hours."),
            Flag(
                "save", "", "Write the compiled executable there; takes minutes longer.", path=True
            ),
            Flag("search", False, "Rank every legal mesh, remat policy and batch size."),
            Flag("scaling", False, "A table from 8 to 65,536 chips; takes no compilation."),
            Flag("compile", True, "Compile; --nocompile gives the analytic estimate alone."),
        ),
        workdir=None,
    ),
    "doctor": Command(
        "Check a config on the devices at hand before chip-hours are spent on it.",
        (
            Flag("conformance", False, "Instead: every router on every dispatch path and mesh."),
            Flag("full", False, "With --conformance: all combinations, not a covering part."),
            *PROCESS_FLAGS,
        ),
        workdir=False,
    ),
    "results": Command(
        "Show a table, CSV and a plot of the runs below a folder.",
        (
            Flag("csv", "", "Also write the table of runs here, numbers in full.", path=True),
            Flag(
                "plot",
                "",
                "Also plot (PNG, SVG or PDF by the name's end); needs matplotlib.",
                path=True,
            ),
            Flag("x", "", "Config key for the plot's right panel, such as model.moe.num_experts."),
            REGISTRATIONS,
        ),
        config=False,
    ),
    "goodput": Command(
        "Show where the time of a run went, restarts and lost steps included.",
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
        "Show where the assignments of a run went, by layer, expert, position and source.",
        (
            Flag("layer", -1, "Only this MoE layer, counted from 0; -1: all of them, added."),
            Flag("from_step", 0, "Leave out earlier steps."),
            Flag(
                "csv",
                "",
                "Also write every count here: axis, layer, name and the fates.",
                path=True,
            ),
        ),
        config=False,
    ),
    "replay": Command(
        "Take one step of a run again and compare it bit for bit with what was logged.",
        (
            Flag("step", 0, "The step, counted from 1 as in metrics.jsonl."),
            Flag("flight", True, "As its flight record has it; --noflight: as it went after that."),
            Flag("from_beginning", False, "Where no checkpoint is early enough: from step 0."),
            Flag(
                "init_from", "", "With --from_beginning: what the run was started with.", path=True
            ),
            REGISTRATIONS,
            *PROCESS_FLAGS,
        ),
        config=False,
    ),
    "check": Command(
        "Check many runs at once: a JSON list of train's arguments a line on standard input.",
        config=False,
        workdir=None,
        listed=False,
    ),
}
TRAIN_BPE = Command(
    "Train a BPE tokenizer on a config's corpus.",
    (
        Flag("vocab_size", 0, "Tokens of the new vocabulary, special ones included."),
        Flag("output", "", "Where the tokenizer.json is written.", path=True),
    ),
    workdir=None,
)


def run_command(name: str, arguments: Sequence[str]) -> NoReturn:
    """Runs one command with the arguments after its name, and exits with its code."""
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
    """The console commands: moe-train is `train`, and so on."""
    streams.guard()
    name = os.path.basename(sys.argv[0]).removesuffix(".exe").removeprefix("moe-")
    run_command(name, sys.argv[1:])


def main() -> NoReturn:
    """python -m moe_jax NAME ARGUMENTS"""
    streams.guard()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        _show(overview())
    if name not in COMMANDS:
        shown = [name for name, command in COMMANDS.items() if command.listed]
        near = suggest(name, [*shown, "data train-bpe"])
        error = UserError(f"{name!r} is not a command of moe_jax{near}.")
        if name.startswith("-"):
            error = UserError(f"There is no command before {name}: name one of {', '.join(shown)}.")
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    run_command(name, arguments)


def _main_of(name: str) -> Callable[..., int | None]:
    """Imports the command when it runs: an interrupt meanwhile ends as one during the command."""

    def main(*given: Any) -> int | None:
        command = importlib.import_module(f"moe_jax.cli.{name}")
        # What the imports made stays, so no garbage collection needs to search it.  Tracing and
        # lowering bench_olmoe_half take 1.4 s of CPU time instead of 1.6 (2 cores, jax 0.10.2).
        gc.freeze()
        return command.main(*given)

    return main


def _show(text: str) -> NoReturn:
    """Prints a help text and exits."""
    try:
        print(text)
        streams.finish()
        code = 0
    except streams.OutputLostError as lost:
        code = lost.tell()
    sys.exit(code)


def overview() -> str:
    """Every listed command with its summary."""
    lines = ["usage: python -m moe_jax COMMAND [--FLAG=VALUE ...]", ""]
    lines += [f"  {n:<11} {c.summary}" for n, c in COMMANDS.items() if c.listed]
    return "\n".join([*lines, "", "python -m moe_jax COMMAND --help lists a command's flags."])


def help_text(name: str, command: Command) -> str:
    """What a command does and its flags with their defaults."""
    lines = [f"usage: python -m moe_jax {name} [--FLAG=VALUE ...]", "", command.summary, ""]
    if command.config:
        lines += [
            "  --config=FILE.py[:ARG]  config file",
            "  --config.KEY=VALUE      override of one key of it, such as --config.train.steps=9",
        ]
    unused = {"workdir"} if command.workdir is None else set()
    flags = [flag for flag in (*COMMON_FLAGS, *command.flags) if flag.name not in unused]
    lines += [f"  --{f.name}={f.default!r}  {f.help}" for f in flags]
    if command.config:
        lines += ["", "With --config=FILE, --help also lists the keys of that config."]
    return "\n".join(lines)
