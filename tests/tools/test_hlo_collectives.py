"""Collectives of compiled programs: counted by hand in small texts, then in a real program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.tools.hlo import array_bytes, mesh_axes, read_collectives

LOOPS = """HloModule jit_train_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups={{0,2,4,6},{1,3,5,7}}
  ROOT %slice = bf16[16,8]{1,0} dynamic-slice(%all-reduce.7), dynamic_slice_sizes={16,8}
}

%inner_body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]) parameter(0)
  %v = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %all-to-all.1 = f32[4,8]{1,0} all-to-all(%v), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %next = (s32[], f32[4,8]) tuple(%s, %all-to-all.1)
}

%condition (s: (s32[], f32[4,8])) -> pred[] {
  %s = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]) parameter(0)
  %gather = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%s), replica_groups={{0,1},{2,3}}
  %gathered = f32[8,8]{1,0} all-gather-done(%gather)
  %fused = bf16[16,8]{1,0} fusion(%s), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %inner = (s32[], f32[4,8]) while(%s), condition=%condition, body=%inner_body
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %start = (s32[], f32[4,8]) tuple(%p)
  %loop = (s32[], f32[4,8]) while(%start), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %permuted = f32[4,8]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
  %total = (f32[10]{0}, /*index=1*/f32[6]{0}) all-reduce(%a, %b), replica_groups=[1,8]<=[8]
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_loops_multiply():
    """Bytes by hand: the outer loop has 3 iterations, the inner loop 5 in each of them."""
    found, unknown = read_collectives(LOOPS)
    assert unknown == 0
    sent = {one.op: (one.times, one.sent(8)) for one in found}
    assert sent == {
        "all-to-all": (15, 15 * 4 * 8 * 4 / 2),
        "all-gather": (3, 3 * 8 * 8 * 4 / 2),
        "reduce-scatter": (3, 3 * 64 * 8 * 2 * 3 / 4),
        "collective-permute": (1, 4 * 8 * 4),
        "all-reduce": (1, 2 * 16 * 4 * 7 / 8),
    }


def test_the_start_of_an_asynchronous_all_reduce_counts_once():
    """On CPUs and TPUs it has the result's type, on GPUs a tuple of operands and results."""
    for kind in ("bf16[16]{0}", "((bf16[16]{0}), bf16[16]{0})"):
        text = (
            "ENTRY %main (p: bf16[16]) -> bf16[16] {\n"
            "  %p = bf16[16]{0} parameter(0)\n"
            f"  %s = {kind} all-reduce-start(%p), replica_groups={{{{0,1}}}}\n"
            "  ROOT %d = bf16[16]{0} all-reduce-done(%s)\n}\n"
        )
        assert [one.sent(2) for one in read_collectives(text).found] == [32.0]


def test_a_loop_of_unknown_length_is_reported():
    text = LOOPS.replace("direction=LT", "direction=NE")
    found, unknown = read_collectives(text)
    assert unknown == 1
    assert {one.op: one.times for one in found}["all-to-all"] == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("(f32[4], /*index=1*/s32[], pred[7])", 16 + 4 + 7),
        ("s4[10]", 5),
        ("f8e4m3fn[16]", 16),
        ("u32[]", 4),
    ],
)
def test_bytes_of_types(text, expected):
    assert array_bytes(text) == expected


def test_groups_name_mesh_axes():
    shape = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    assert mesh_axes((0, 1), shape) == "expert"
    assert mesh_axes((0, 2), shape) == "fsdp"
    assert mesh_axes((0, 2, 4, 6), shape) == "data x fsdp"
    assert mesh_axes((), shape) == "data x fsdp x expert"


def test_a_scan_compiled_here_is_counted(mesh_of):
    """A program compiled by the installed XLA: 6 iterations of one psum over 4 devices."""
    mesh = mesh_of(data=4)

    def body(x, _):
        return jax.lax.psum(x, "data") * 0.5, None

    def program(x):
        return jax.lax.scan(body, x, length=6)[0]

    sharded = jax.shard_map(program, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
    text = jax.jit(sharded).lower(x).compile().as_text()
    assert text is not None
    found, unknown = read_collectives(text)
    assert unknown == 0
    assert sum(one.sent(4) for one in found) == 6 * 2 * 32 * 8 * 4 * 3 / 4
