"""Sections of the config that no other room owns: how long, what is kept, watched and shown."""

import dataclasses
import re
from typing import Annotated

from moe_jax import bounds
from moe_jax.bounds import Limit, Rule, at_least, one_of
from moe_jax.decides import Data, Run, Training
from moe_jax.errors import UserError

MODES = ("online", "offline")
SPIKE = Limit("more than 1, or 0 for none", lambda factor: factor == 0 or factor > 1)
SECONDS = Limit("seconds, or 0 for no limit", lambda seconds: seconds >= 0)
HEARTBEAT = Limit("seconds, 1 or more", lambda seconds: seconds >= 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how large a batch, and what is logged."""

    steps: Training[Annotated[int, at_least(1)]] = 200  # length of the run
    # Rows per step, over all devices and microbatches; a multiple of accumulation.
    batch_size: Data[Annotated[int, at_least(1)]] = 32
    accumulation: Training[Annotated[int, at_least(1)]] = 1  # microbatches per step
    log_every: Run[Annotated[int, at_least(1)]] = 10  # steps between rows of metrics
    # "20:23" captures a trace of steps 20, 21, 22 into WORKDIR/profile.
    profile_steps: Run[Annotated[str, Rule("FIRST:END, or empty for none")]] = ""
    deterministic: Run[bool] = False  # NVIDIA: kernels that repeat bit for bit, at a cost
    max_skipped: Training[Annotated[int, at_least(0)]] = (
        3  # refused steps in a row that the run bears
    )
    # A step is refused where its loss or gradient norm is more than so many times the running
    # mean; 0: never.
    spike_factor: Training[Annotated[float, SPIKE]] = 100.0
    # Times the whole run may go back and leave out batches; 0: it ends.
    max_rewinds: Training[Annotated[int, at_least(0)]] = 2
    ledger_every: Run[Annotated[int, at_least(0)]] = (
        100  # steps between rows of ledger.jsonl; 0: none
    )
    # Steps between comparisons of the state's copies on several devices, each also compared before
    # a save; 0: never.  One comparison reads the state once, as each optimizer update does.
    replica_check_every: Run[Annotated[int, at_least(0)]] = 1000
    debug: Run[bool] = False  # assert inside the step that no assignment is lost or counted twice

    def __post_init__(self):
        bounds.check(self, "train.")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.batch_size ({self.batch_size}) is not divisible by train.accumulation "
                f"({self.accumulation}): change one of them."
            )
        self.profile_range()

    def profile_range(self) -> range:
        """The steps to trace; empty when no trace is asked for."""
        if not self.profile_steps:
            return range(0)
        first, _, last = self.profile_steps.partition(":")
        digits = re.compile("[0-9]{1,12}").fullmatch
        if not (digits(first) and digits(last) and int(first) < int(last)):
            raise UserError(
                f"train.profile_steps is {self.profile_steps!r}: write FIRST:END, such as 20:23."
            )
        return range(int(first), int(last))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out loss and samples."""

    every: Run[Annotated[int, at_least(0)]] = 100  # steps between evaluations; 0: only at the end
    rows: Run[Annotated[int, at_least(0)]] = 512  # held-out rows per evaluation; 0: the whole split
    samples: Run[Annotated[int, at_least(0)]] = 2  # texts generated at the end
    sample_tokens: Run[Annotated[int, at_least(0)]] = 200  # tokens per text, after the prompt
    sample_prompt: Run[str] = "def "  # each text begins with it
    temperature: Run[Annotated[float, at_least(0)]] = 0.8  # of sampling; 0: greedy

    def __post_init__(self):
        bounds.check(self, "eval.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: Run[Annotated[int, at_least(0)]] = 100  # steps between saves; 0: off
    every_minutes: Run[Annotated[float, at_least(0)]] = 30.0  # minutes between saves; 0: off
    keep_last: Run[Annotated[int, at_least(1)]] = 3  # newest checkpoints that are kept
    keep_every: Run[Annotated[int, at_least(0)]] = 0  # also keep every n-th step for good; 0: off

    def __post_init__(self):
        bounds.check(self, "checkpoint.")


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """Seconds after which a run counts as hung and ends with exit code 42; 0: never."""

    compile: Run[Annotated[float, SECONDS]] = 7200.0  # compiling the train step
    # One step, or what several hosts agree on between two.
    step: Run[Annotated[float, SECONDS]] = 1800.0
    data: Run[Annotated[float, SECONDS]] = 1800.0  # waiting for a batch
    # Copying a checkpoint to the host, waiting for one that is written, loading one.
    checkpoint: Run[Annotated[float, SECONDS]] = 7200.0
    # A whole evaluation, its compilation included.
    evaluation: Run[Annotated[float, SECONDS]] = 7200.0
    # Before the first step, without a document read or stored meanwhile.
    start: Run[Annotated[float, SECONDS]] = 1800.0
    # Another process that gives no sign of life: JAX then aborts all others (exit code 134).
    heartbeat: Run[Annotated[int, HEARTBEAT]] = 100

    def __post_init__(self):
        bounds.check(self, "watchdog.")


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases (extra `wandb`), which shows the rows that TensorBoard shows."""

    project: Run[str] = ""  # the project that the run is shown in; empty: not used
    # offline: files in WORKDIR/wandb, for `wandb sync`; no network is used.
    mode: Run[Annotated[str, one_of(MODES)]] = "online"
    name: Run[str] = ""  # of the run; empty: the last part of --workdir
    entity: Run[str] = ""  # user or team; empty: the account's default

    def __post_init__(self):
        bounds.check(self, "wandb.")
