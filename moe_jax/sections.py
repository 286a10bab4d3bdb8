"""Sections of the config that no other package owns: training, evaluation, checkpoints, watchdog.

Also Weights & Biases.
"""

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
    """Length of the run, batch size, safeguards and logging."""

    steps: Training[Annotated[int, at_least(1)]] = 200  # length of the run
    # Rows per step, over all devices and microbatches; a multiple of accumulation.
    batch_size: Data[Annotated[int, at_least(1)]] = 32
    accumulation: Training[Annotated[int, at_least(1)]] = 1  # microbatches per step
    log_every: Run[Annotated[int, at_least(1)]] = 10  # steps between rows of metrics
    # Steps to trace; "20:23" writes a trace of steps 20, 21, 22 to WORKDIR/profile.
    profile_steps: Run[Annotated[str, Rule("FIRST:END, or empty for none")]] = ""
    deterministic: Run[bool] = False  # NVIDIA: bit-for-bit reproducible but slower kernels
    # Skipped steps in a row that the run tolerates; one more is divergence.
    max_skipped: Training[Annotated[int, at_least(0)]] = 3
    # A step is skipped if its loss or gradient norm exceeds the running mean times this factor; 0:
    # never.
    spike_factor: Training[Annotated[float, SPIKE]] = 100.0
    # Rewinds allowed in the whole run, each of which skips batches; 0: divergence ends the run.
    max_rewinds: Training[Annotated[int, at_least(0)]] = 2
    # Steps between rows of ledger.jsonl; 0: no rows.
    ledger_every: Run[Annotated[int, at_least(0)]] = 100
    # Steps between comparisons of the state's replicas, which are also compared before each save;
    # 0: never.  One comparison reads the state once, as each optimizer update does.
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
        """The steps to trace; empty if no trace is requested."""
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
    samples: Run[Annotated[int, at_least(0)]] = 2  # sample texts generated at the end of the run
    sample_tokens: Run[Annotated[int, at_least(0)]] = 200  # tokens per sample, after the prompt
    sample_prompt: Run[str] = "def "  # prompt of every sample
    temperature: Run[Annotated[float, at_least(0)]] = 0.8  # sampling temperature; 0: greedy

    def __post_init__(self):
        bounds.check(self, "eval.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saving and retention of checkpoints."""

    every_steps: Run[Annotated[int, at_least(0)]] = 100  # steps between saves; 0: off
    every_minutes: Run[Annotated[float, at_least(0)]] = 30.0  # minutes between saves; 0: off
    keep_last: Run[Annotated[int, at_least(1)]] = 3  # number of newest checkpoints to keep
    # Checkpoints of steps divisible by this are never deleted; 0: off.
    keep_every: Run[Annotated[int, at_least(0)]] = 0

    def __post_init__(self):
        bounds.check(self, "checkpoint.")


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """Seconds after which a run counts as hung and ends with exit code 42; 0: never."""

    compile: Run[Annotated[float, SECONDS]] = 7200.0  # compiling the train step
    # One step, or an agreement of several hosts between two steps.
    step: Run[Annotated[float, SECONDS]] = 1800.0
    data: Run[Annotated[float, SECONDS]] = 1800.0  # waiting for a batch
    # Copying a checkpoint to the host, waiting until one is written, or loading one.
    checkpoint: Run[Annotated[float, SECONDS]] = 7200.0
    # A whole evaluation, including its compilation.
    evaluation: Run[Annotated[float, SECONDS]] = 7200.0
    # Time before the first step in which no document is read or stored.
    start: Run[Annotated[float, SECONDS]] = 1800.0
    # Time without a heartbeat from one process; JAX then aborts all others (exit code 134).
    heartbeat: Run[Annotated[int, HEARTBEAT]] = 100

    def __post_init__(self):
        bounds.check(self, "watchdog.")


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases (extra `wandb`), which shows the same rows as TensorBoard."""

    project: Run[str] = ""  # project of the run; empty: Weights & Biases is not used
    # Offline writes files to WORKDIR/wandb, for `wandb sync`, and uses no network.
    mode: Run[Annotated[str, one_of(MODES)]] = "online"
    name: Run[str] = ""  # name of the run; empty: the last part of --workdir
    entity: Run[str] = ""  # user or team; empty: the account's default

    def __post_init__(self):
        bounds.check(self, "wandb.")
