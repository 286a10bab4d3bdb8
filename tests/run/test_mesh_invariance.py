"""Loss and drops do not depend on the mesh or on gradient accumulation."""

import functools
import itertools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from small_run import EXACT, small_config, write_corpus

from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.run.context import Run
from moe_jax.run.loop import compile_step, lower_step
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare
from moe_jax.run.step_log import step_row
from moe_jax.train.state import state_shardings

STEPS = 20
COUNTS = ("assignments", "kept", "dropped", "unsampled", "padding", "lost_tokens")
LAYOUTS = {
    "one": {"data": 1},
    "data": {"data": 8},
    "expert": {"expert": 8},
    "data_expert": {"data": 2, "expert": 4},
    "all": {"fsdp": 2, "expert": 2, "tensor": 2},
}
ROUTERS = {
    "switch": {"model.moe.options.switch.jitter": 0.1},
    "gshard": {"model.moe.options.gshard.random_second": True},
    "sigmoid_bias": {"model.moe.options.sigmoid_bias.update_rate": 0.05},
    "top_k": {},
}
DISPATCHES = ("capacity", "dropless")


class Cell(NamedTuple):
    """One way to run the same training."""

    layout: str
    accumulation: int
    router: str
    dispatch: str


# Every mesh axis, with microbatches, a router that samples, and drops.  The cells left to --full
# each differ in one of these.
DEFAULT = (Cell("all", 4, "switch", "capacity"),)
EVERY = itertools.starmap(Cell, itertools.product(LAYOUTS, (1, 4), ROUTERS, DISPATCHES))
CELLS = [cell if cell in DEFAULT else pytest.param(*cell, marks=pytest.mark.full) for cell in EVERY]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """`prepared(cell, precision)`: the training of a cell, prepared on the devices it needs."""
    folder = tmp_path_factory.mktemp("invariance")
    files = write_corpus(folder / "text")

    def make(cell: Cell, precision: str) -> Run:
        mesh = LAYOUTS[cell.layout]
        overrides = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
        config = small_config(
            files,
            **overrides,
            **ROUTERS[cell.router],
            **{"model.num_layers": 1, "model.moe.every": 1},
            **{"precision": precision, "model.moe.router": cell.router},
            **{"model.moe.dispatch": cell.dispatch, "model.moe.balance_scope": "group"},
            # 64 rows in groups of 2: the finest layout holds one group in a microbatch.
            **{"train.batch_size": 64, "model.moe.group_rows": 2, "train.steps": STEPS},
            **{"train.accumulation": cell.accumulation},
        )
        devices = jax.devices()[: int(np.prod(list(mesh.values())))]
        return prepare(config, folder / "run", lambda line: None, devices)

    return make


@pytest.fixture(scope="module")
def free_run(prepared):
    """`free_run(cell)`: losses and counts of 20 steps in float64."""

    @functools.cache
    def run_cell(cell: Cell) -> tuple[list[float], list[list[int]]]:
        with jax.enable_x64(True):
            run = prepared(cell, "float64")
            state = restore_or_init_state(run, "", lambda line: None)
            step_fn, results = None, []
            with feed(run) as batches:
                for _, batch in batches:
                    step_fn = step_fn or lower_step(run).compile(EXACT)
                    state, metrics = step_fn(state, batch)
                    results.append(step_row(metrics))
        return [row["loss"] for row in results], [counts_of(row) for row in results]

    return run_cell


def feed(run: Run) -> DeviceFeed:
    return DeviceFeed(run.batches.rows, run.microbatch, batch_shardings(run.mesh), 0, STEPS)


def counts_of(row: dict) -> list[int]:
    return [row[name] for name in COUNTS]


@pytest.mark.parametrize(("layout", "accumulation", "router", "dispatch"), CELLS)
def test_float64_runs_agree(free_run, layout, accumulation, router, dispatch):
    cell = Cell(layout, accumulation, router, dispatch)
    losses, counts = free_run(cell)
    expected_losses, expected_counts = free_run(Cell("one", 1, router, dispatch))
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-10)
    assert counts == expected_counts
    dropped = [row[COUNTS.index("dropped")] for row in counts]
    assert (max(dropped) > 0) == (dispatch == "capacity")
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("layout", "accumulation", "router", "dispatch"),
    [
        Cell("all", 4, "top_k", "capacity"),
        pytest.param(*Cell("expert", 4, "gshard", "dropless"), marks=pytest.mark.full),
        pytest.param(*Cell("data", 1, "switch", "capacity"), marks=pytest.mark.full),
    ],
)
def test_float32_steps_from_one_state_agree(prepared, layout, accumulation, router, dispatch):
    one = prepared(Cell("one", 1, router, dispatch), "float32")
    other = prepared(Cell(layout, accumulation, router, dispatch), "float32")
    where = state_shardings(other.model, other.optimizer, other.mesh)
    state = restore_or_init_state(one, "", lambda line: None)
    one_fn = other_fn = None
    with feed(one) as batches, feed(other) as other_batches:
        for (_, batch), (_, other_batch) in zip(batches, other_batches, strict=True):
            # A copy: both steps donate their state.
            moved = jax.device_put(jax.tree.map(np.asarray, state), where)
            other_fn = other_fn or compile_step(other)
            one_fn = one_fn or compile_step(one)
            _, found = other_fn(moved, other_batch)
            state, expected = one_fn(state, batch)
            found, expected = step_row(found), step_row(expected)
            # Near 5 the spacing of float32 is 4.8e-7: allow four spacings, two were observed.
            assert found["loss"] == pytest.approx(expected["loss"], rel=0, abs=2e-6)
            assert counts_of(found) == counts_of(expected)
