"""`load` reads a trained model from a run's workdir or from a saved model's folder."""

import dataclasses
import os

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import PRECISIONS, Config
from moe_jax.data.tokenizers import Tokenizer, config_tokenizer
from moe_jax.errors import UserError
from moe_jax.model.define import ModelDef, Params, define
from moe_jax.model.mesh_fit import mesh_fault
from moe_jax.parallel.mesh import MeshConfig, check_mesh, make_mesh
from moe_jax.pretrained.folder import open_folder
from moe_jax.pretrained.loaded_model import LoadedModel
from moe_jax.pretrained.tokenizer import tokenizer_name
from moe_jax.pretrained.weights import newest_good_step, read_params, read_router_state


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Load a trained model: parameters, router state and tokenizer, but no optimizer state.

    No file at `path` is written, moved or locked, so the run may be training meanwhile.

    Args:
      path: workdir of a run, or a folder that `LoadedModel.save` wrote; local or gs://.
      step: step of the checkpoint; None: the newest that verifies (SHA-256 of every file).
      dtype: compute dtype, float32 or bfloat16; None: the run's precision.  Weights stay float32.
        A float64 run loads only as float64, under jax_enable_x64.
      mesh: mesh for the weights, as `make_mesh` makes it; None: one device.

    Returns:
      The model with its parameters, router state and tokenizer; see `logits` and `save`.

    Raises:
      UserError: the folder, step or dtype does not exist; the mesh does not fit the model; or a
        checkpoint, config or tokenizer is missing or damaged.
    """
    call, folder = f"load({os.fspath(path)!r})", epath.Path(path).expanduser()
    if mesh is None:
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    check_mesh(mesh)
    config, checkpoints = open_folder(folder, call)
    try:
        model = define(config.model, _compute_dtype(call, dtype, config))
        fault = mesh_fault(model, mesh)
        if fault is not None:
            raise UserError(f"{call}: {fault}: pass a mesh of other sizes, or none.")
        name = tokenizer_name(folder, config)
        tokenizer = _tokenizer(call, name, config)
        step, params, router_state = _weights(call, checkpoints, step, model, mesh)
    finally:
        checkpoints.close()
    return LoadedModel(config, model, params, router_state, tokenizer, name, mesh, step)


def _compute_dtype(call: str, dtype: DTypeLike | None, config: Config) -> jnp.dtype:
    try:
        name = jnp.dtype(config.precision if dtype is None else dtype).name
    except TypeError:
        name = str(dtype)
    if name not in PRECISIONS:
        raise UserError(f"{call}: dtype is {name!r}: use one of {', '.join(PRECISIONS)}.")
    if (name == "float64") != (config.precision == "float64"):
        raise UserError(
            f"{call}: dtype is {name} and the run computed in {config.precision}: load a float64 "
            f"run as float64, and any other run as float32 or bfloat16."
        )
    if name == "float64" and not jax.config.jax_enable_x64:
        raise UserError(
            f'{call}: the run computed in float64: call jax.config.update("jax_enable_x64", True) '
            f"first."
        )
    return jnp.dtype(name)


def _tokenizer(call: str, name: str, config: Config) -> Tokenizer:
    if name != "bytes" and not epath.Path(name).expanduser().exists():
        raise UserError(
            f"{call}: the run's tokenizer {name} is missing: restore it, or put a copy beside "
            f"config.json, as tokenizer.json or (SentencePiece) tokenizer.model."
        )
    tokenizer = config_tokenizer(dataclasses.replace(config.data, tokenizer=name))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{call}: the tokenizer {name} has {tokenizer.vocab_size} ids and the model only "
            f"{config.model.vocab_size}: restore the run's tokenizer."
        )
    return tokenizer


def _weights(
    call: str, checkpoints: Checkpoints, wanted: int | None, model: ModelDef, mesh: Mesh
) -> tuple[int, Params, dict[str, jax.Array]]:
    """(step, parameters, router state) of step `wanted`; None: of the newest good step."""
    while True:
        step = _good_step(call, checkpoints, wanted)
        try:
            params = read_params(checkpoints, step, model, mesh)
            return step, params, read_router_state(checkpoints, step, model, mesh)
        except UserError:
            # A live run may have deleted the step since it verified; newer steps then exist.
            if wanted is not None or step in checkpoints.steps():
                raise


def _good_step(call: str, checkpoints: Checkpoints, wanted: int | None) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{call}: its checkpoints/ is empty: load it after the run has saved one.")
    if wanted is not None and wanted not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"{call}: no checkpoint of step {wanted}: it has steps {there}.")
    step = newest_good_step(checkpoints) if wanted is None else wanted
    if step is None:
        why = checkpoints.examine(steps[-1])
        raise UserError(
            f"{call}: none of its checkpoints verifies (newest: step {steps[-1]}, {why}): restore "
            f"a copy."
        )
    bad = None if wanted is None else checkpoints.examine(wanted)
    if bad is not None:
        raise UserError(f"{call}: the checkpoint of step {step} is bad ({bad}): load another step.")
    return step
