"""Every router x dispatch path x mesh x dtype x remat, five scenarios each, against the oracle."""

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.moe.routers import ROUTERS
from moe_jax.tools.doctor.conformance import cases, run
from moe_jax.tools.doctor.conformance.cells import Cell, all_cells, pairwise
from moe_jax.tools.doctor.conformance.compare import Error
from moe_jax.tools.doctor.conformance.oracle import expected, route
from moe_jax.tools.doctor.conformance.reference import REFERENCE

CELLS = all_cells()
CHOSEN = pairwise(CELLS)
DEFAULT = CHOSEN[:15]
PAIRS = [pytest.param(cell, marks=pytest.mark.lifecycle) for cell in CHOSEN[15:]]
REST = [pytest.param(cell, marks=pytest.mark.full) for cell in CELLS if cell not in CHOSEN]
ONE = Cell("top_k", "capacity", "one_device", "float32", False)


@pytest.mark.parametrize("cell", [*DEFAULT, *PAIRS, *REST], ids=str)
def test_cell(cell):
    verdict = run.run_cell(cell)
    assert verdict.passed, verdict


def test_the_chosen_cells_hold_every_pair_of_values():
    for one in range(5):
        for other in range(one):
            every = {(cell[one], cell[other]) for cell in CELLS}
            assert {(cell[one], cell[other]) for cell in CHOSEN} == every
    # The default cells hold every value of every field.
    for axis in range(5):
        assert {cell[axis] for cell in DEFAULT} == {cell[axis] for cell in CELLS}
    assert len(CHOSEN) < 1.2 * len(ROUTERS) * len(cases.MESHES)


def model(router: str):
    return cases.layer(router, "capacity", "one_device", "float32", False).model


def test_the_scenarios_are_what_they_are_called():
    given = cases.scenarios(model("top_k"))

    def load(name, k=None):
        ids_GSK = route(model("top_k"), given[name]).ids_GSK
        return np.bincount(ids_GSK[..., :k].reshape(-1), minlength=cases.E)

    assert set(load("even")) == {cases.B * cases.T * 3 // cases.E}
    assert load("skewed").max() > 4 * load("skewed").min()
    assert list(load("empty") == 0) == [False, False, *[True] * 4, False, False]
    assert list(load("one_expert", 1) > 0) == [e == 5 for e in range(cases.E)]
    assert 0 < given["padded"].mask_BT.sum() < cases.B * cases.T
    assert not given["padded"].mask_BT[2:4].any()  # a group that is all padding


@pytest.mark.parametrize("router", ROUTERS)
def test_no_choice_hangs_on_rounding(router):
    """Moving tokens and weights by 30 times float32's rounding changes no assignment."""
    rng = np.random.default_rng(0)

    def moved(array):
        return array * (1 + 2e-6 * rng.uniform(-1, 1, array.shape))

    for case in cases.scenarios(model(router)).values():
        ours = route(model(router), case)
        for _ in range(5):
            params = {name: moved(value) for name, value in case.params.items()}
            theirs = route(model(router), case._replace(params=params, x_BTD=moved(case.x_BTD)))
            np.testing.assert_array_equal(ours.ids_GSK, theirs.ids_GSK)
            np.testing.assert_array_equal(ours.valid_GSK, theirs.valid_GSK)


def test_a_tight_capacity_drops_in_every_scenario_but_the_even_one():
    layer = cases.layer("top_k", "capacity", "one_device", "float32", False)
    dropped = {
        name: expected(layer, case).outcomes["total"].dropped_capacity
        for name, case in cases.scenarios(layer.model).items()
    }
    assert dropped.pop("even") == 0
    assert min(dropped.values()) > 10


def test_every_router_has_its_formulas():
    assert set(REFERENCE) == set(ROUTERS)


@pytest.mark.lifecycle
def test_a_router_without_formulas_is_compared_with_itself(monkeypatch):
    monkeypatch.setitem(ROUTERS, "new", ROUTERS["top_k"])
    assert run.run_cell(ONE._replace(router="new")).passed


def conformance(monkeypatch, outcomes):
    """The command's (exit code, lines) if cells end as `outcomes` say."""
    cells = {ONE._replace(mesh=mesh): outcome for mesh, outcome in outcomes.items()}

    def run_cell(cell):
        if isinstance(cells[cell], Exception):
            raise cells[cell]
        return run.Verdict(cell, Error("output", cells[cell]), "even", 1e-5)

    monkeypatch.setattr(run, "all_cells", lambda: list(cells))
    monkeypatch.setattr(run, "run_cell", run_cell)
    lines = []
    return run.main_conformance(True, lines.append), lines


def test_the_command_prints_a_table_and_fails_with_a_cell(monkeypatch):
    code, lines = conformance(monkeypatch, {"one_device": 1e-6, "data8": 2e-5})
    assert code == 1
    assert any(line.startswith("FAIL") and "data8" in line and "2.0e-05" in line for line in lines)
    assert any(line.startswith("pass") and "one_device" in line for line in lines)
    assert lines[-1] == "1 of 2 cells pass"
    assert conformance(monkeypatch, {"one_device": 1e-6})[0] == 0


def test_a_cell_that_cannot_run_or_is_not_a_number_fails(monkeypatch):
    code, lines = conformance(monkeypatch, {"one_device": ValueError("boom"), "data8": 1e-6})
    assert code == 1
    assert any(line.startswith("FAIL") and "ValueError: boom" in line for line in lines)
    assert conformance(monkeypatch, {"one_device": float("inf")})[0] == 1


def test_cells_for_more_devices_are_left_out_by_name(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    code, lines = conformance(monkeypatch, {"one_device": 0.0, "data8": 0.0})
    assert code == 0
    assert lines[-1] == "1 of 1 cells pass"
    assert any("mesh data8 left out: it needs 8 devices" in line for line in lines)


def test_without_a_cpu_the_oracle_asks_for_one(monkeypatch):
    def no_cpu(platform):
        raise RuntimeError(platform)

    layer = cases.layer(*ONE)
    case = cases.scenarios(layer.model)["even"]
    monkeypatch.setattr(jax, "devices", no_cpu)
    with pytest.raises(UserError, match="add ,cpu to it"):
        expected(layer, case)
