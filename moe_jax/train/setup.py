"""Everything a run stands on before its first step: config, mesh, model, data, state."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import checkpoint
from moe_jax.config import Config, read_config
from moe_jax.data.build import build, store_root
from moe_jax.data.pipeline import Batches, HeldOut, Supply
from moe_jax.data.store import Store
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.files import json_files
from moe_jax.files.workdir import Folder
from moe_jax.model.layout import to_stacked
from moe_jax.model.stack import ModelDef, define
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.layer import make_router
from moe_jax.nn.params import param_dtype
from moe_jax.ops.attention import check_attention
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.xla_flags import use_deterministic_kernels
from moe_jax.train import resolve
from moe_jax.train.copies import make_copies
from moe_jax.train.guard import first_guard
from moe_jax.train.optim import Optimizer
from moe_jax.train.record import DATA_RECORD
from moe_jax.train.state import (
    TrainState,
    checkpoint_bytes,
    everywhere,
    from_disk,
    make_optimizer,
    new_state,
    param_shardings,
    placed_state,
    state_shardings,
    to_disk,
)
from moe_jax.train.step import StepOptions

Say = Callable[[str], None]

# What decides which tokens a step sees, how they are grouped, or what the router's parameters mean
# though their shapes agree: a resumed run must keep it.
_KEPT_ON_RESUME = (
    "seed",
    "train.batch_size",
    "data.source",
    "data.files",
    "data.field",
    "data.tokenizer",
    "data.sequence_length",
    "data.heldout_fraction",
    "data.mixture",
    "model.confine_attention",
    "model.moe.router",
    "model.moe.top_k",
    "model.moe.group_rows",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What does not change during a run."""

    config: Config
    workdir: Folder
    mesh: Mesh
    model: ModelDef
    optimizer: Optimizer
    store: Store
    batches: Batches
    supply: Supply | None  # of steps of the data, under data.max_epochs; None: for ever
    heldout: HeldOut
    checkpoints: checkpoint.Checkpoints

    @property
    def microbatch(self) -> tuple[int, int, int]:
        """(accumulation, rows, T) of a global batch."""
        train = self.config.train
        rows = train.batch_size // train.accumulation
        return train.accumulation, rows, self.config.data.sequence_length

    @property
    def step_options(self) -> StepOptions:
        """What the train step takes from the config."""
        return StepOptions.of(self.config, len(self.store.sources))


def prepare(
    config: Config,
    workdir: Folder,
    say: Say,
    devices: Sequence[Any] | None = None,
    alive: Callable[[], None] = lambda: None,
    text: Callable[..., Store] = build,
) -> Run:
    """Resolve the config, build or open the store, define the model, check that all of it fits.

    Args:
      config: as written.
      workdir: folder of the run; nothing is written to it here.
      say: called with lines for the start-up log.
      devices: to run on; None: every device of every process.
      alive: called whenever some of the text was read or stored, which may take hours.
      text: what gets the store, called as `build` is.

    Raises:
      UserError: anything the user has to change, before anything is compiled.
    """
    devices = jax.devices() if devices is None else devices
    # What needs no text comes first: tokenising may take hours.
    config, notes = settle(config, workdir, len(devices))
    check_attention(
        config.model.attention,
        devices[0].platform,
        config.data.sequence_length,
        jnp.dtype(config.precision),
    )
    store = text(config.data, store_root(config.data, workdir), progress=say, alive=alive)
    store.check_vocabulary(config.model.vocab_size)
    if _saved_config(workdir) is not None:
        _check_same_text(store, workdir)
    mesh = make_mesh(config.mesh, devices)
    model = define(config.model, jnp.dtype(config.precision))
    resolve.check_shapes(model, mesh)
    optimizer = make_optimizer(config)
    checkpoints = checkpoint.Checkpoints(
        workdir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_every
    )
    checkpoint.check_disk(checkpoints.root, checkpoint_bytes(model, optimizer))
    batches = Batches.for_training(
        store,
        config.seed,
        config.train.batch_size,
        config.data.sequence_length,
        config.model.confine_attention,
    )
    supply = batches.supply(config.data.max_epochs)
    if supply is not None and not supply.steps:
        raise UserError(
            f"The {supply.text(store.streams)}, read {config.data.max_epochs} times "
            f"(data.max_epochs), makes no batch of {config.train.batch_size}: add text, raise that "
            f"or lower train.batch_size."
        )
    heldout = HeldOut(
        store,
        config.train.batch_size // config.train.accumulation,
        config.data.sequence_length,
        config.model.confine_attention,
    )
    for line in [*notes, *resolve.describe(config)]:
        say(line)
    return Run(
        config, workdir, mesh, model, optimizer, store, batches, supply, heldout, checkpoints
    )


def set_numerics(config: Config) -> None:
    """JAX's own settings for a config: after `distributed.start`, before anything is compiled.

    Raises:
      UserError: float64 on devices that do not have it.
    """
    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
        if jax.default_backend() != "cpu":
            raise UserError(
                "precision float64 is the oracle and runs on the CPU: set "
                "JAX_PLATFORMS=cpu or another precision."
            )
    if config.train.deterministic:
        use_deterministic_kernels()


def settle(config: Config, workdir: Folder, num_devices: int) -> tuple[Config, list[str]]:
    """The config as it will run, with notes for the log, from all but the text.

    Raises:
      UserError: sizes that do not fit, or another run than the one that is in `workdir`.
    """
    saved = _saved_config(workdir)
    if saved is not None:
        config = _keep_groups(config, saved)
    vocabulary = load_tokenizer(config.data.tokenizer).vocab_size
    config, notes = resolve.resolve(config, num_devices, vocabulary)
    return config, notes + (_check_resume(config, saved) if saved is not None else [])


def _saved_config(workdir: Folder) -> Config | None:
    """The resolved config of the run that is in `workdir`, if it has a checkpoint to go on from."""
    path, checkpoints = workdir / "config.json", workdir / "checkpoints"
    if not checkpoints.exists():
        return None
    if not checkpoints.is_dir():
        raise UserError(f"{checkpoints} is not a folder: move it away.")
    steps = any(entry.name.isdecimal() for entry in checkpoints.iterdir())
    if not path.exists() and not steps:
        return None
    try:
        return read_config(path)
    except (UserError, FileNotFoundError) as error:
        why = "it is missing" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
        raise UserError(
            f"{path}, which says what the checkpoints beside it are, cannot be used ({why}): bring "
            f"it back, or use another --workdir (with --init_from to keep the weights)."
        ) from None


def _keep_groups(config: Config, saved: Config) -> Config:
    """Routing groups were resolved once, with the first mesh; they stay as they were."""
    if config.model.moe.group_rows:
        return config
    moe = dataclasses.replace(config.model.moe, group_rows=saved.model.moe.group_rows)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def _check_resume(config: Config, saved: Config) -> list[str]:
    """Notes for the log; UserError where tokens, groups or the router would be others."""
    for name in _KEPT_ON_RESUME:
        new, old = _get(config, name), _get(saved, name)
        if new != old:
            raise UserError(
                f"config.{name} is {new!r} but the run in this workdir has {old!r}: use that, or "
                f"another --workdir (with --init_from to keep the weights)."
            )
    steps, before = config.train.steps, saved.train.steps
    notes = [f"train.steps was {before}: the schedule follows {steps}"] if steps != before else []
    epochs, before = config.data.max_epochs, saved.data.max_epochs
    if epochs != before:
        notes.append(f"data.max_epochs was {before}, is {epochs}: same batches, another end")
    if config.mesh != saved.mesh:
        notes.append(f"mesh was {saved.mesh}, is {config.mesh}: same batches, equal to rounding")
    if config.model.dense:
        return notes
    return notes + _changed_knobs(config.model.moe, saved.model.moe)


def _changed_knobs(new: MoEConfig, old: MoEConfig) -> list[str]:
    """A line for each knob of the router that was another: some are turned on purpose in a run.

    DeepSeek-V3 (arXiv 2412.19437) trains its last tokens with an update rate of 0.  And one where
    the experts multiply in another precision.
    """
    after, before = vars(make_router(new)), vars(make_router(old))
    lines = [
        f"ROUTER CHANGED: {name} of {new.router} was {before[name]} in this run and is {value} "
        f"from here on"
        for name, value in after.items()
        if before[name] != value
    ]
    if new.matmul != old.matmul:
        lines.append(f"model.moe.matmul was {old.matmul} in this run and is {new.matmul} from here")
    return lines


def _check_same_text(store: Store, workdir: Folder) -> None:
    """Raises UserError when the files behind a resumed run's data have changed."""
    path = workdir / DATA_RECORD
    if path.exists() and json_files.read(path) != {"fingerprint": store.fingerprint}:
        raise UserError(
            f"The text of the run in {workdir}, or its tokenizer, has changed since it began "
            f"({DATA_RECORD} there holds another fingerprint): bring the files back, or use "
            f"another --workdir (with --init_from to keep the weights)."
        )


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def first_state(run: Run, init_from: str, say: Say) -> TrainState:
    """The newest good checkpoint of the workdir, else other weights, else a fresh state."""
    found = run.checkpoints.restore_latest(lambda step: _target(run, step), say)
    if found is not None:
        step, tree = found
        say(f"resuming from step {step}")
        return _placed(run, step, tree, say)
    return fresh_state(run, init_from, say)


def fresh_state(run: Run, init_from: str, say: Say) -> TrainState:
    """What a run begins with: other weights, else new ones."""
    weights: dict[str, Any] = {}
    if init_from:
        say(f"starting from the weights in {init_from}")
        weights = _weights_of(run, init_from, say)  # refused before anything is compiled
    key = jax.random.key(run.config.seed, impl="threefry2x32")
    state = new_state(run.model, run.optimizer, run.mesh, key)
    if weights:
        copies = make_copies(run.model, weights["params"])
        state = dataclasses.replace(state, **weights, copies=copies)
    return state


def _disk_target(run: Run) -> dict[str, Any]:
    """Abstract tree of a checkpoint, with shardings: that of the model's unrolled twin."""
    flat = define(dataclasses.replace(run.config.model, scan_layers=False), run.model.dtype)
    target = placed_state(flat, run.optimizer, run.mesh)
    return to_disk(target, flat.layout)


def restored_state(run: Run, step: int, say: Say) -> TrainState:
    """The checkpoint of `step`, which verifies, on the run's mesh."""
    return _placed(run, step, run.checkpoints.restore(step, _target(run, step)), say)


def moved_state(state: TrainState, old: Run, new: Run, say: Say) -> TrainState:
    """The state of `old` as `new` has it: on its mesh, its layers stacked as that model's are."""
    where = jax.tree.map(lambda leaf: leaf.sharding, _disk_target(new))
    tree = jax.device_put(to_disk(state, old.model.layout), where)
    return _placed(new, int(state.step), tree, say)


def _target(run: Run, step: int) -> dict[str, Any]:
    """`_disk_target`, without the step guard where the checkpoint of `step` is older than that."""
    target = _disk_target(run)
    if not any(name.startswith("guard/") for name in run.checkpoints.describe(step)):
        del target["guard"]
    return target


def _placed(run: Run, step: int, tree: dict[str, Any], say: Say) -> TrainState:
    """The state of a checkpoint's tree, its layers stacked as the model has them."""
    if "guard" not in tree:
        say("the checkpoint is older than the step guard: its running means start anew")
        fresh = jax.jit(
            lambda: first_guard(param_dtype(run.model.dtype), step),
            out_shardings=everywhere(run.mesh),
        )
        tree = tree | {"guard": fresh()}
    if not run.model.layout.repeats:
        return from_disk(tree, run.model)
    shardings = state_shardings(run.model, run.optimizer, run.mesh)
    return jax.jit(lambda tree: from_disk(tree, run.model), out_shardings=shardings)(tree)


def _weights_of(run: Run, workdir: str, say: Say) -> dict[str, Any]:
    """`params` of another run's newest good checkpoint, and `router` state.

    Without `router` where that run's router keeps other state: this one's then starts anew.
    """
    other = checkpoint.Checkpoints(os.path.join(workdir, "checkpoints"))
    good = (step for step in reversed(other.steps()) if other.verify(step) is None)
    step = next(good, None)  # a bad one is passed over but not moved: the run is not ours
    if step is None:
        raise UserError(f"--init_from={workdir} holds no checkpoint: name another run's workdir.")
    target = _disk_target(run)
    params = other.restore_subtree(step, "params", target["params"])
    where = param_shardings(run.model, run.mesh)
    stack = jax.jit(lambda p: to_stacked(p, run.model.layout), out_shardings=where)
    found = {"params": stack(params)}
    here = sorted(target["router"])
    there = sorted(k.split("/")[1] for k in other.describe(step) if k.startswith("router/"))
    if here == there:
        found["router"] = other.restore_subtree(step, "router", target["router"])
    else:
        mine, its = (", ".join(names) or "none" for names in (here, there))
        say(f"router state starts anew: this run's router keeps {mine}, that run's kept {its}")
    other.close()
    return found
