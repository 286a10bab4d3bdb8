"""No code outside a dispatch path's file depends on its name: a renamed copy behaves the same."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config, from_config_dict
from moe_jax.config_file import read_config_file
from moe_jax.data.batch import make_batch
from moe_jax.data.feed import put_batch
from moe_jax.eval.heldout import make_eval_step, never_dropping
from moe_jax.model.define import define
from moe_jax.model.initialize import init
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.run import resolve
from moe_jax.tools.hlo import read_collectives
from moe_jax.tools.plan import analytic, work
from moe_jax.tools.plan.lowering import lower, make_plan

KNOBS = {"dropless": ({}, {"recv_factor": 2.0})}
CASES = [(name, knobs) for name in DISPATCH for knobs in KNOBS.get(name, ({},))]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def twins(request, monkeypatch):
    """The config of a path, and the config of its copy under a different name."""
    name, knobs = request.param
    copy = dataclasses.make_dataclass("Copy", [], bases=(DISPATCH[name],), frozen=True)
    monkeypatch.setitem(DISPATCH, "copy", copy)
    return config_of(name, knobs), config_of("copy", knobs)


def config_of(dispatch: str, knobs=None, remat: str = "save_hidden") -> Config:
    config = read_config_file("configs/tiny.py")
    config.model.update(
        {"vocab_size": 64, "num_layers": 1, "width": 32, "num_heads": 2, "num_kv_heads": 2}
    )
    config.model.update({"head_dim": 16, "ffn_width": 64, "remat": remat})
    moe = {"num_experts": 8, "top_k": 2, "expert_width": 16, "every": 1, "group_rows": 1}
    config.model.moe.update(moe | {"dispatch": dispatch, "priority": "choice"})
    config.model.moe.options = {dispatch: dict(knobs or {})}
    config.data.sequence_length, config.train.batch_size = 32, 16
    config.mesh.update({"data": 1, "expert": 8})
    return from_config_dict(config)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_plan_and_notes_are_those_of_the_path_itself(twins):
    one, copy = (make_plan(config, 8) for config in twins)
    assert analytic.estimate(one) == analytic.estimate(copy)
    assert work.executed_flops(one) == work.executed_flops(copy)
    assert work.traffic(one) == work.traffic(copy)
    assert one.notes == copy.notes
    described = [resolve.describe(plan.config, plan.model.components) for plan in (one, copy)]
    assert [line.replace("copy", twins[0].model.moe.dispatch) for line in described[1]] == (
        described[0]
    )


def test_the_held_out_evaluation_is_that_of_the_path_itself(twins, mesh_of):
    mesh, sums = mesh_of(data=1), []
    for config in twins:
        config = dataclasses.replace(config, mesh=MeshConfig(data=1))
        model = define(config.model, jnp.float32)
        params = jax.jit(lambda key, model=model: init(model, key))(jax.random.key(0))
        tokens_BT = np.random.default_rng(0).integers(0, 64, (2, 32)).astype(np.int32)
        batch = put_batch(make_batch(tokens_BT, tokens_BT), mesh)
        evaluate = jax.jit(make_eval_step(model, 1, mesh))
        sums.append(jax.device_get(evaluate(params, {}, batch)))
        assert (never_dropping(model) is model) == (not model.components.dispatch.drops)
    jax.tree.map(np.testing.assert_array_equal, *sums)


@pytest.mark.parametrize(
    ("dispatch", "remat"),
    [
        ("capacity", "full"),
        pytest.param("einsum", "full", marks=pytest.mark.lifecycle),
        pytest.param("capacity", "none", marks=pytest.mark.full),
        pytest.param("einsum", "none", marks=pytest.mark.full),
    ],
)
def test_all_to_alls_are_those_of_the_compiled_program(dispatch, remat):
    """The all-to-alls that XLA compiles are those that the planner counts."""
    plan = make_plan(config_of(dispatch, remat=remat), 8)
    text = lower(plan, jax.devices()).compile().as_text() or ""
    sent = collections.Counter()
    for one in read_collectives(text).found:
        sent[one.op] += one.sent(8)
    planned = collections.Counter()
    for one in work.traffic(plan):
        planned[one.op] += one.bytes
    assert planned["all-to-all"] == pytest.approx(sent["all-to-all"], rel=1e-6)
    assert planned["all-to-all"] > 0


def test_what_lets_later_tokens_evict_earlier_ones_is_a_note():
    """`choice` lets them; a bounded receive buffer of dropless does not (test_causality.py)."""
    notes = make_plan(config_of("capacity"), 8).notes
    assert any("priority choice is not causal" in note for note in notes)
    assert not make_plan(config_of("dropless", {"recv_factor": 2.0}), 8).notes
    assert not make_plan(config_of("dropless"), 8).notes
