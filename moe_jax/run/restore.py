"""Makes the first train state: from a checkpoint, from the weights of another run, or new."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.model.define import define
from moe_jax.nn.params import param_dtype
from moe_jax.pretrained.weights import (
    newest_good_step,
    read_params,
    read_router_state,
    router_state_names,
)
from moe_jax.run.context import Run, Say
from moe_jax.run.origin import check_origin, open_origin
from moe_jax.train.copies import copy_program, leaves_with_copies, make_copies
from moe_jax.train.guard import first_guard
from moe_jax.train.state import (
    TrainState,
    from_disk,
    init_train_state,
    initial_router_state,
    placed_fall,
    placed_state,
    replicated,
    state_shardings,
    to_disk,
)


def restore_or_init_state(run: Run, init_from: str, say: Say) -> TrainState:
    """Restore the newest good checkpoint of the workdir, or make a fresh state."""
    found = run.checkpoints.restore_latest(lambda step: _target(run, step), say)
    if found is not None:
        step, tree = found
        say(f"resuming from step {step}")
        return _placed(run, step, tree, say)
    state = fresh_state(run, init_from, say)
    if jax.config.jax_compilation_cache_dir:
        _compile_for_resume(run)
    return state


def fresh_state(run: Run, init_from: str, say: Say) -> TrainState:
    """Make the state of step 0, with the weights of `init_from` or, if it is empty, new ones."""
    weights: dict[str, Any] = {}
    if init_from:
        say(f"starting from the weights in {init_from}")
        weights = _weights_of(run, init_from, say)  # before compiling, which an error would waste
    key = jax.random.key(run.config.seed, impl="threefry2x32")
    state = init_train_state(run.model, run.optimizer, run.mesh, key)
    if weights:
        copies = make_copies(run.model, weights["params"])
        state = dataclasses.replace(state, **weights, copies=copies)
    return state


def _disk_target(run: Run) -> dict[str, Any]:
    """The abstract tree of a checkpoint, with shardings: its layers are never stacked."""
    model = dataclasses.replace(run.config.model, scan_layers=False)
    flat = define(model, run.model.dtype, run.model.components)
    target = placed_state(flat, run.optimizer, run.mesh)
    return to_disk(target, flat.layout)


def restored_state(run: Run, step: int, say: Say) -> TrainState:
    """Restore the checkpoint of `step`, already verified, onto the run's mesh."""
    return _placed(run, step, run.checkpoints.restore(step, _target(run, step)), say)


def moved_state(state: TrainState, old: Run, new: Run, say: Say) -> TrainState:
    """Move the state of `old` to the mesh and the layer stacking of `new`."""
    where = jax.tree.map(lambda leaf: leaf.sharding, _disk_target(new))
    tree = jax.device_put(to_disk(state, old.model.layout), where)
    return _placed(new, int(state.step), tree, say)


def _target(run: Run, step: int) -> dict[str, Any]:
    """`_disk_target`, without the step guard if the checkpoint of `step` has none (old version)."""
    target = _disk_target(run)
    if not any(name.startswith("guard/") for name in run.checkpoints.describe(step)):
        del target["guard"]
    return target


def _placed(run: Run, step: int, tree: dict[str, Any], say: Say) -> TrainState:
    """Make the train state from a checkpoint's tree; stacks the layers as the model does."""
    if "guard" not in tree:
        say("step guard: running means reset, because the checkpoint has none")
        fresh = jax.jit(
            lambda: first_guard(param_dtype(run.model.dtype), step),
            out_shardings=replicated(run.mesh),
        )
        tree = tree | {"guard": fresh()}
    fall = placed_fall(run.optimizer, run.mesh)
    if not run.model.layout.repeats:
        return from_disk(tree, run.model, fall)
    return _placing(run)(tree, fall)


def _placing(run: Run) -> jax.stages.Wrapped:
    """Make the program that stacks the layers of a checkpoint's tree."""

    def place(tree: dict[str, Any], fall: jax.Array) -> TrainState:
        return from_disk(tree, run.model, fall)

    return jax.jit(place, out_shardings=state_shardings(run.model, run.optimizer, run.mesh))


def _compile_for_resume(run: Run) -> None:
    """Compile, in a thread, what only a resumed start needs, to have it in the compile cache."""

    def compile_it() -> None:
        tree = _disk_target(run)
        if run.model.layout.repeats:
            _placing(run).lower(tree, placed_fall(run.optimizer, run.mesh)).compile()
        elif leaves_with_copies(run.model, run.model.abstract):
            copy_program(run.model).lower(tree["params"]).compile()

    thread = ThreadPoolExecutor(1, thread_name_prefix="compiling")
    thread.submit(compile_it)
    thread.shutdown(wait=False)


def _weights_of(run: Run, workdir: str, say: Say) -> dict[str, Any]:
    """Read `params` and `router` state of the newest good checkpoint of another run.

    Without `router` if that run's router keeps different state: the state is then reset.
    """
    check_origin(run.config, workdir)
    _, other = open_origin(workdir)
    step = newest_good_step(other)
    if step is None:
        there = other.steps()
        why = f" that can be used (step {there[-1]}: {other.examine(there[-1])})" if there else ""
        raise UserError(
            f"--init_from={workdir} holds no checkpoint{why}: name the workdir of a run that saved "
            f"one."
        )
    found: dict[str, Any] = {"params": read_params(other, step, run.model, run.mesh)}
    here = sorted(jax.eval_shape(lambda: initial_router_state(run.model)))
    there = router_state_names(other, step)
    if here == there:
        found["router"] = read_router_state(other, step, run.model, run.mesh)
    else:
        mine, its = (", ".join(names) or "none" for names in (here, there))
        say(
            f"router state reset: this run's router keeps {mine}, the router of that run kept {its}"
        )
    other.close()
    return found
