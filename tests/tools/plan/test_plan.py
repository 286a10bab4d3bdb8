"""The planner's analytic model against numbers by hand, and its refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.moe.config import MoEConfig
from moe_jax.nn.remat import REMAT
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.tools.plan import analytic, work
from moe_jax.tools.plan.chips import CHIPS
from moe_jax.tools.plan.lowering import make_plan
from moe_jax.tools.plan.roofline import Traffic, roofline, torus_rings
from moe_jax.tools.plan.search import meshes, plan_on_one_device, search
from moe_jax.tools.plan.topology import parse_topology
from moe_jax.train.optim import OptimizerConfig
from moe_jax.train.state import abstract_state, state_shardings

MODEL = ModelConfig(
    vocab_size=512,
    num_layers=4,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    scan_layers=True,
    remat="full",
    loss_chunk=128,
    moe=MoEConfig(num_experts=8, top_k=2, expert_width=128, capacity_factor=2.0),
)


MESH = MeshConfig(data=1, fsdp=2, expert=4)


def small(mesh: MeshConfig = MESH, batch: int = 16, **model) -> Config:
    """Make a config of rows of 128 tokens in bfloat16."""
    config = Config(precision="bfloat16", mesh=mesh, model=dataclasses.replace(MODEL, **model))
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=batch),
        data=dataclasses.replace(config.data, sequence_length=128),
    )


def test_state_is_what_the_trainer_holds(mesh_of):
    """The bytes equal those of the shards under the trainer's own shardings, per optimizer."""
    factored = {"width": 128, "moe": dataclasses.replace(MODEL.moe, expert_width=256)}
    few = dataclasses.replace(factored["moe"], num_experts=4)  # fsdp splits their width
    for name, model in (
        ("adamw", {}),
        ("adafactor", {}),
        ("adafactor", factored),
        ("adafactor", factored | {"moe": few}),
        ("optax.scale_by_lion", {}),
        ("muon", {}),
    ):
        config = small(**model)
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, name=name)
        )
        plan = make_plan(config, 8)
        state = abstract_state(plan.model, plan.optimizer)
        where = state_shardings(plan.model, plan.optimizer, mesh_of(fsdp=2, expert=4))

        def held(tree, places):
            pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
            return sum(
                int(jnp.prod(jnp.array(at.shard_shape(leaf.shape)))) * leaf.dtype.itemsize
                for leaf, at in pairs
            )

        parts = ("params", "copies", "optimizer")
        expected = tuple(held(getattr(state, part), getattr(where, part)) for part in parts)
        assert analytic.state_bytes(plan) == expected


def test_memory_of_a_small_model_by_hand():
    """fsdp 2 x expert 4, 2 rows per device, capacity factor 2: every size written out."""
    plan = make_plan(small(), 8)
    N, D, V, L = 2 * 128, 64, 512, 4
    M = 8 * (2 * N * 2 // 8)  # 8 experts; a group's 512 assignments, doubled, over 8
    F, wide = 128, M * 128 * 2
    assert analytic.local_sizes(plan).M == M
    memory = analytic.estimate(plan)
    attention = D * 16 * (4 + 2 + 2 + 4)
    experts = 3 * D * F * 2  # two of eight experts on a device
    router, norms = D * 8, 2 * D
    copied = L * (attention / 2 + experts / 2)
    split = copied + L * (router / 2 + norms) + V * D + D
    assert memory.parameters == 4 * split + 2 * copied
    assert memory.optimizer == pytest.approx(8 * split, rel=1e-3)  # and Adam's counters
    assert memory.activations == L * N * D * 2 + 4 * N * D * 2
    assert memory.dispatch == 4 * wide + 3 * M * D * 2
    assert memory.gradients == 4 * split - 2 * copied + V * D * 4
    gathered = 2 * (attention + experts + router)
    assert memory.collectives == 2 * gathered + 5 * M * D * 2


def test_a_transformation_with_one_moment_needs_half_of_adams_two():
    """Except the counters, of which there is one per parameter of one layer."""
    sizes = {}
    for name in ("adamw", "optax.scale_by_lion"):
        config = dataclasses.replace(small(), optimizer=OptimizerConfig(name))
        plan = make_plan(config, 8)
        counters = sum(leaf.whole for leaf in plan.leaves)
        sizes[name] = analytic.estimate(plan).optimizer - counters
        assert 0 < counters < 1000
    assert sizes["optax.scale_by_lion"] == sizes["adamw"] / 2


def test_flops_and_traffic_by_hand():
    plan = make_plan(small(), 8)
    tokens, D, F = 16 * 128, 64, 128
    active = 4 * (D * 16 * 12 + D * 8 + 2 * 3 * D * F) + D * 512
    model = 6 * (active + 4 * 128 * 64)
    assert plan.flops == model
    slots = 6 * 4 * 2 * 3 * D * F  # half of the slots are empty
    again = 2 * 4 * (D * 16 * 12 + 2 * 2 * 2 * D * F) + 2 * 4 * 128 * 64
    assert work.executed_flops(plan) == (model + slots + again) * tokens / 8
    sent = {(one.op, one.axes): one.bytes for one in work._tokens(plan, analytic.local_sizes(plan))}
    M = 1024
    assert sent == {("all-to-all", "expert"): 4 * M * (5 * D * 2 + 3 * 4) * 3 / 4}


def test_dropless_without_a_bound_sends_each_token_once_to_every_other_shard():
    """Its buffer has rows for all tokens of the axis at up to K of its experts."""
    moe = MoEConfig(num_experts=8, expert_width=128, dispatch="dropless")
    plan = make_plan(small(moe=moe), 8)
    local = analytic.local_sizes(plan)
    assert local.M == 4 * local.N * 2
    sent = {one.op: one.bytes for one in work._tokens(plan, local)}
    token = 4 * 3 * local.N * 64 * 2
    assert sent == {"all-gather": 3 * token, "reduce-scatter": 2 * token}
    bounded = dataclasses.replace(moe, options={"dropless": {"recv_factor": 2.0}})
    plan = make_plan(small(moe=bounded), 8)
    assert [one.op for one in work._tokens(plan, analytic.local_sizes(plan))] == ["all-to-all"]


def test_less_is_kept_and_more_computed_down_the_policies():
    """From none to save_hidden, save_dispatch and full, memory falls and work rises.

    Between the last two, full also repeats the dispatch with its all-to-all.
    """
    order = ("none", "save_hidden", "save_dispatch", "full")
    assert set(order) < set(REMAT)
    plans = [make_plan(small(remat=remat), 8) for remat in order]
    saved = [analytic.saved_bytes(plan, analytic.local_sizes(plan)) for plan in plans]
    assert saved == sorted(saved, reverse=True) and len(set(saved)) == 4
    flops = [work.executed_flops(plan) for plan in plans]
    assert flops == sorted(flops) and len(set(flops)) == 3 and flops[2] == flops[3]
    sent = [sum(one.bytes for one in work.traffic(plan)) for plan in plans]
    assert sent[0] == sent[1] == sent[2] < sent[3]


def test_every_chip_has_believable_figures():
    for name, chip in CHIPS.items():
        assert chip.peak_flops > 1e14, name
        # To be compute-bound, a chip needs 100 to 1,000 FLOPs per byte that it reads.
        assert 100 < chip.peak_flops / chip.hbm_bandwidth < 1000, name
        assert chip.network < chip.link < chip.hbm_bandwidth, name
        assert chip.source.startswith("https://"), name


def test_roofline_of_one_resource_at_a_time():
    topology = parse_topology("v5p:4x4x4")
    plan = make_plan(small(MeshConfig(1, 16, 4, 1), batch=64), 64)
    assert torus_rings(plan.mesh.shape, topology)["expert"] == [4]
    one = roofline(plan, topology, 459e12, 0.0, [])
    assert (one.limit, one.seconds) == ("compute", 1.0)
    one = roofline(plan, topology, 0.0, 2 * 2765e9, [])
    assert (one.limit, one.seconds) == ("HBM", 2.0)
    # In a ring of 4 a byte crosses one link on average, and there is one link per direction.
    one = roofline(plan, topology, 0.0, 0.0, [Traffic("all-to-all", "expert", 200e9)])
    assert (one.limit, one.seconds) == ("expert", 1.0)
    # fsdp has the other two sides of the torus: four links per chip.
    one = roofline(plan, topology, 0.0, 0.0, [Traffic("all-gather", "fsdp", 400e9)])
    assert (one.limit, one.seconds) == ("fsdp", 1.0)


@pytest.mark.parametrize("name", ["v9:2x2", "v5p:8x8", "v5p:", "v5p:0x1x1", "h200:x", "h200:2x2"])
def test_a_wrong_topology_is_one_sentence(name):
    with pytest.raises(UserError, match=r"^[^\n]*topology[^\n]*\.$"):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        # Sides as in the vendor's tables of v5p, v5e and v6e.
        ("v5p-1024", "1024 TensorCores, 2 per chip: write the shape, v5p:8x8x8."),
        ("v5p-8", "v5p:2x2x1."),
        ("v5p-32", "v5p:2x2x4."),
        ("v5p-64", "v5p:2x4x4."),
        ("v5p-384", "v5p:4x4x12."),
        ("V5P-4096", "v5p:8x16x16."),
        ("v5p-12288", "v5p:16x16x24."),
        ("v5litepod-16", "16 chips: write the shape, v5e:4x4."),
        ("v5e-8", "v5e:2x4."),
        ("v6e-256", "v6e:16x16."),
        ("h200-8", "h200:8."),
        ("v5p:512", "not a size of v5p: write v5p:8x8x8."),
        ("v5e:128", "write v5e:8x16."),
        ("v4-8", "v4 is not known. Use one of v5e, v5p, "),
        # No such slice: an odd core, more chips than a pod, sides that are not made of cubes.
        ("v5p-7", "such as v5p:4x4x4."),
        ("v5p-999999", "such as v5p:4x4x4."),
        ("v5p-200", "such as v5p:4x4x4."),
        ("v5litepod-999", "such as v5e:4x4."),
        ("tpu7x-128", "such as tpu7x:4x4x4."),
        ("v5p-99999999999999999999", "unknown"),
        ("v9-8", "unknown"),
    ],
)
def test_names_that_count_cores_or_chips_get_their_shape(name, answer):
    with pytest.raises(UserError) as error:
        parse_topology(name)
    assert answer in str(error.value) and "\n" not in str(error.value)
    suggested = re.search(r"write (?:the shape, )?(\S+)\.$", str(error.value))
    if suggested:
        parse_topology(suggested[1])


def test_search_says_why():
    """Layouts that fit are ranked; an indivisible head count and too little memory are named."""
    topology = parse_topology("v5e:2x4")
    plan = plan_on_one_device(small())
    everything = search(plan, topology, 1e12, batches=(16,))
    speeds = [one.seconds_per_token for one in everything.found]
    assert speeds and speeds == sorted(speeds)
    assert any("kv_heads" in one.why for one in everything.rejected)  # 2 over tensor 4
    nothing = search(plan, topology, 1e5, batches=(16,))
    assert nothing.found == []
    assert any(
        re.fullmatch(r"needs .* MiB of 0\.1 MiB per device", one.why) for one in nothing.rejected
    )
    assert {one.layout for one in everything.rejected} < {one.layout for one in nothing.rejected}


def test_meshes_cover_each_split_once():
    found = list(meshes(16, 4))
    assert len(found) == len(set(found))
    assert all(m.data * m.fsdp * m.expert * m.tensor == 16 for m in found)
    assert MeshConfig(2, 2, 4, 1) in found and MeshConfig(1, 1, 2, 8) in found
    assert max(mesh.expert for mesh in found) == 4
