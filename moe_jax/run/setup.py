"""Prepares a run before its first step: resolves the config, makes mesh, model and data."""

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
    on_progress: Callable[[], None] = lambda: None,
    build_store: Callable[..., Store] = build_store,
    init_from: str = "",
) -> Run:
    """Resolve the config, build or open the store, define the model and check that all fit.

    Args:
      config: as written.
      workdir: directory of the run; nothing is written to it here.
      say: called with the lines of the start-up log.
      devices: to run on; None: all devices of all processes.
      on_progress: called when building the store, which may take hours, makes progress.
      build_store: builds or opens the store; called like `moe_jax.data.build_store`.
      init_from: workdir of the run whose weights a new run starts from; empty: none.

    Raises:
      UserError: the user has to change something; raised before anything is compiled.
    """
    devices = jax.devices() if devices is None else devices
    # Checks that need no text come first, because tokenising may take hours.
    config, components, notes = resolve_config(config, workdir, len(devices), init_from)
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
    root = store_root(config.data, workdir)
    store = build_store(config.data, root, progress=say, on_progress=on_progress)
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
            f"config.data.max_epochs is {config.data.max_epochs}: the {supply.text(store.streams)} "
            f"is too short for one batch of {config.train.batch_size} rows. Add text, raise "
            f"data.max_epochs or lower train.batch_size."
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
    """Apply the JAX settings of a config, after `distributed.start` and before any compilation.

    Raises:
      UserError: a platform is missing, or float64 is set on devices that do not support it.
    """
    if config.train.deterministic:
        use_deterministic_kernels()
    check_platforms()
    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
        if jax.default_backend() != "cpu":
            raise UserError(
                "config.precision is float64: it is for reference results and runs only on the "
                "CPU. Set JAX_PLATFORMS=cpu, or set precision float32 or bfloat16."
            )


def resolve_config(
    config: Config, workdir: Folder, num_devices: int, init_from: str = ""
) -> resolve.Resolved:
    """Resolve the config, without reading the text, and collect notes for the start-up log.

    Args:
      config: as written.
      workdir: directory of the run.
      num_devices: of all processes.
      init_from: workdir of the run whose weights a new run starts from; ignored on resume.

    Raises:
      UserError: sizes do not fit, the config is not that of the run in `workdir`, or the weights
        of `init_from` belong to a different model.
    """
    saved = saved_config(workdir)
    if saved is not None:
        config = keep_groups(config, saved)
    tokenizer = config_tokenizer(config.data)
    found = resolve.resolve(config, num_devices, tokenizer.vocab_size)
    if saved is not None:
        check_tokenizer(tokenizer.identity, workdir)  # first: it decides sizes compared below
        notes = check_resume(found.config, saved)
    else:
        notes = check_origin(found.config, init_from) if init_from else []
    return found._replace(notes=found.notes + notes)
