"""Everything a run stands on before its first step: config, mesh, model, data."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import checkpoint
from moe_jax.config import Config
from moe_jax.data.build import build_store, store_root
from moe_jax.data.pipeline import Batches, HeldOut
from moe_jax.data.store import Store
from moe_jax.data.tokenizers import config_tokenizer
from moe_jax.errors import UserError
from moe_jax.files.workdir import Folder
from moe_jax.model.define import define
from moe_jax.ops.attention import check_attention
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.platforms import check_platforms
from moe_jax.parallel.xla_flags import use_deterministic_kernels
from moe_jax.run import resolve
from moe_jax.run.context import Run, Say, make_optimizer
from moe_jax.run.origin import check_origin
from moe_jax.run.resume import (
    check_resume,
    check_same_text,
    check_tokenizer,
    keep_groups,
    saved_config,
)
from moe_jax.train.state import (
    checkpoint_bytes,
)


def prepare(
    config: Config,
    workdir: Folder,
    say: Say,
    devices: Sequence[Any] | None = None,
    alive: Callable[[], None] = lambda: None,
    text: Callable[..., Store] = build_store,
    init_from: str = "",
) -> Run:
    """Resolve the config, build or open the store, define the model, check that all of it fits.

    Args:
      config: as written.
      workdir: folder of the run; nothing is written to it here.
      say: called with lines for the start-up log.
      devices: to run on; None: every device of every process.
      alive: called whenever some of the text was read or stored, which may take hours.
      text: what gets the store, called as `build` is.
      init_from: folder of the run whose weights a new one begins with; empty: none.

    Raises:
      UserError: anything the user has to change, before anything is compiled.
    """
    devices = jax.devices() if devices is None else devices
    # What needs no text comes first: tokenising may take hours.
    config, components, notes = settle(config, workdir, len(devices), init_from)
    check_attention(
        config.model.attention,
        devices[0].platform,
        config.data.sequence_length,
        jnp.dtype(config.precision),
    )
    mesh = make_mesh(config.mesh, devices)
    model = define(config.model, jnp.dtype(config.precision), components)
    resolve.check_shapes(model, mesh)
    optimizer = make_optimizer(config, model)
    store = text(config.data, store_root(config.data, workdir), progress=say, alive=alive)
    store.check_vocabulary(config.model.vocab_size)
    check_same_text(store, workdir)
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
        config.eval.rows,
    )
    for line in [*notes, *resolve.describe(config, components)]:
        say(line)
    return Run(
        config, workdir, mesh, model, optimizer, store, batches, supply, heldout, checkpoints
    )


def set_numerics(config: Config) -> None:
    """JAX's own settings for a config: after `distributed.start`, before anything is compiled.

    Raises:
      UserError: a platform that is not there, or float64 on devices that do not have it.
    """
    if config.train.deterministic:
        use_deterministic_kernels()
    check_platforms()
    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
        if jax.default_backend() != "cpu":
            raise UserError(
                "precision float64 is the oracle and runs on the CPU: set "
                "JAX_PLATFORMS=cpu or another precision."
            )


def settle(
    config: Config, workdir: Folder, num_devices: int, init_from: str = ""
) -> resolve.Resolved:
    """The config as it will run, with notes for the log, from all but the text.

    Args:
      config: as written.
      workdir: folder of the run.
      num_devices: over all processes.
      init_from: folder of the run whose weights a new one begins with; a run that goes on does
        not look at it.

    Raises:
      UserError: sizes that do not fit, another run than the one that is in `workdir`, or weights
        that are another model's.
    """
    saved = saved_config(workdir)
    if saved is not None:
        config = keep_groups(config, saved)
    tokenizer = config_tokenizer(config.data)
    found = resolve.resolve(config, num_devices, tokenizer.vocab_size)
    if saved is not None:
        check_tokenizer(tokenizer.identity, workdir)  # which decides sizes: first
        notes = check_resume(found.config, saved)
    else:
        notes = check_origin(found.config, init_from) if init_from else []
    return found._replace(notes=found.notes + notes)
