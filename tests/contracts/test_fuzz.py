"""Random layers against the oracle, and random illegal configs, each refused in one sentence."""

import collections
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

from moe_jax.config import PRECISIONS, default_config, from_config_dict
from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.moe.config import BALANCE_SCOPES, PRIORITIES, MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS
from moe_jax.nn.remat import REMAT
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.run.resolve import resolve
from moe_jax.tools.doctor.conformance import cases
from moe_jax.tools.doctor.conformance.compare import errors
from moe_jax.tools.doctor.conformance.oracle import Outcome, expected, route
from moe_jax.tools.doctor.conformance.subject import compiled

# Each part has few draws, because after some draws hypothesis mostly varies earlier ones.
DRAWS = 9  # the first draw is the smallest case, the same in all parts: only part 0 runs it
PARTS, FULL = range(250), [pytest.mark.full]
CONFIG_PARTS = [pytest.param(part, marks=FULL * (part > 4)) for part in PARTS]
# Each draw compiles a layer and its oracle, which takes seconds.  The matrix of test_conformance
# holds every router, path, mesh and precision by default; draws add unusual sizes.
LAYER_PARTS = [pytest.param(part, marks=FULL * (part > 0)) for part in PARTS]

# Larger than in the matrix, because random sizes and weights can be ill-conditioned.
ALLOWED = {"float32": 1e-4, "bfloat16": 1e-1}
# Roundings between weights and a result, which at worst add up: products, activation, sums.
ROUNDINGS = 10
SIZES = [sizes for sizes in itertools.product((1, 2, 3, 4, 8), repeat=4) if math.prod(sizes) <= 8]


def drawn(test, strategy, part: int) -> None:
    """Run a test on the draws of a part: the same in every run, different in every part."""
    plain = settings(
        max_examples=DRAWS,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking a failure would compile hundreds of layers
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    draws = itertools.count()

    def unless_repeated(drawn_value) -> None:
        if next(draws) or part == 0:
            test(drawn_value)

    seed(part)(plain(given(strategy)(unless_repeated)))()


@st.composite
def options(draw, router: str, experts: int) -> tuple[int, dict]:
    """Draw legal (top_k, knobs of the router)."""
    least = 2 if router == "noisy_top_k" else 1
    top_k = draw(st.integers(least, experts))
    knobs = {}
    if router == "top_k":
        knobs["renormalize"] = top_k > 1 and draw(st.booleans())
    if router == "sigmoid_bias":
        groups = draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0]))
        stay = draw(st.integers(math.ceil(top_k * groups / experts), groups))
        knobs = {
            "expert_groups": groups,
            "top_groups": stay,
            "renormalize": top_k > 1 and draw(st.booleans()),
            "routed_scale": draw(st.sampled_from([1.0, 2.5])),
        }
    if router == "hash":
        knobs = {"table_size": draw(st.integers(experts, 99)), "seed": draw(st.integers(0, 9))}
    else:
        knobs["jitter"] = draw(st.sampled_from([0.0, 0.1]))
        knobs["logit_cap"] = draw(st.sampled_from([0.0, 10.0]))
    return top_k, knobs


@st.composite
def layers(draw) -> tuple[cases.Layer, cases.Case]:
    """Draw a legal layer, with a batch that its mesh can split."""
    mesh = MeshConfig(*draw(st.sampled_from(SIZES)))
    router = draw(st.sampled_from(sorted(ROUTERS)))
    few = 2 if router in ("gshard", "noisy_top_k") else 1
    experts = mesh.expert * draw(
        st.integers(math.ceil(few / mesh.expert), max(2, 8 // mesh.expert))
    )
    top_k, knobs = draw(options(router, experts))
    scope = draw(st.sampled_from(BALANCE_SCOPES))
    microbatches = 1 if scope == "global" else draw(st.integers(1, 3))
    group_rows = draw(st.integers(1, 3))
    rows = mesh.batch_shards * microbatches * group_rows * draw(st.integers(1, 2))
    # Without a bound on the receive buffer, and with a bound that no load reaches.
    bound = draw(st.sampled_from([0.0, float(mesh.expert)]))
    moe = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        expert_width=mesh.tensor * draw(st.integers(1, 8)),
        router=router,
        dispatch=draw(st.sampled_from(sorted(DISPATCH))),
        capacity_factor=draw(st.floats(0.1, 4)),
        eval_capacity_factor=draw(st.floats(0.1, 4)),
        priority=draw(st.sampled_from(PRIORITIES)),
        group_rows=group_rows,
        balance_scope=scope,
        options={router: knobs, "dropless": {"recv_factor": bound}},
    )
    model = ModelConfig(
        width=mesh.fsdp * draw(st.integers(1, 16)),
        activation=draw(st.sampled_from(["swiglu", "gelu"])),
        remat=draw(st.sampled_from(sorted(REMAT))),
        moe=moe,
    )
    layer = cases.Layer(
        model,
        mesh,
        draw(st.sampled_from(["float32", "bfloat16"])),
        draw(st.booleans()),
        microbatches,
    )
    positions = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(0, positions), min_size=rows, max_size=rows))
    return layer, steady_case(
        layer, rows, positions, np.array(lengths), draw(st.integers(0, 10**6))
    )


def steady_case(layer: cases.Layer, rows: int, positions: int, lengths, number: int) -> cases.Case:
    """Draw arrays for which rounding changes no assignment; seeds that fail this are skipped."""
    for attempt in range(5):
        case = cases.draw(number + attempt, layer.model, rows, positions)
        case = case._replace(mask_BT=np.arange(positions) < lengths[:, None])
        if steady(layer, case):
            return case
    assume(False)
    raise AssertionError


def steady(layer: cases.Layer, case: cases.Case) -> bool:
    """True if slightly moved tokens keep their experts, in the same order of weight."""

    def places(x_BTD):
        routed = route(layer.model, case._replace(x_BTD=x_BTD), layer.train)
        order_GS = np.argsort(-np.where(routed.valid_GSK, routed.weights_GSK, -1).max(-1), axis=1)
        order = order_GS if layer.model.moe.priority == "batch" else 0
        return routed.ids_GSK, routed.valid_GSK, order

    rng = np.random.default_rng(0)
    noise = 1 + 1e-5 * rng.uniform(-1, 1, (3, *case.x_BTD.shape))
    still = places(case.x_BTD)
    moved = (places(case.x_BTD * factor) for factor in noise)
    return all(np.array_equal(a, b) for other in moved for a, b in zip(still, other, strict=True))


def rounding_moves(layer: cases.Layer, case: cases.Case, right: Outcome) -> dict[str, float]:
    """The change of each quantity of the oracle if weights and cotangent are rounded once.

    In a layer of width 1, sums can cancel, and no 8-bit mantissa can represent the result.  Tokens
    and routers are not rounded, so the assignments stay the same.
    """
    rng = np.random.default_rng(0)
    step = float(jnp.finfo(layer.dtype).eps) / 2

    def rounded(array):
        return array * (1 + step * rng.uniform(-1, 1, array.shape))

    moved: dict[str, float] = collections.defaultdict(float)
    for _ in range(3):
        params = {n: rounded(v) if n.startswith("w_") else v for n, v in case.params.items()}
        near = case._replace(params=params, cotangent_BTD=rounded(case.cotangent_BTD))
        for error in errors(expected(layer, near), right):
            moved[error.quantity] = max(moved[error.quantity], error.relative)
    return moved


def agrees(given_layer) -> None:
    layer, case = given_layer
    found, right = compiled(layer)(case), expected(layer, case)
    wrong = [e for e in errors(found, right) if not e.relative <= ALLOWED[layer.dtype]]
    if wrong:
        blurred = rounding_moves(layer, case, right)
        wrong = [
            e
            for e in wrong
            if not math.isfinite(e.relative) or e.relative > ROUNDINGS * blurred[e.quantity]
        ]
    assert not wrong
    assert found.outcomes["total"].total() == found.assignments
    for outcomes in found.outcomes.values():
        assert np.sum(outcomes.total()) == found.assignments


@pytest.mark.lifecycle
@pytest.mark.parametrize("part", LAYER_PARTS)
def test_layers_agree_with_the_oracle(part):
    drawn(agrees, layers(), part)


# Changes that make a legal config illegal: a key and values, each illegal on its own.
ILLEGAL = {
    "model.moe.num_experts": st.integers(-9, 0),
    "model.moe.top_k": st.integers(-9, 0) | st.integers(9, 99),
    "model.moe.expert_width": st.integers(-9, 0),
    "model.moe.router": st.text(max_size=8).filter(lambda name: name not in ROUTERS)
    | st.just("expert_choice"),
    "model.moe.dispatch": st.text(max_size=8).filter(lambda name: name not in DISPATCH),
    "model.moe.capacity_factor": st.floats(max_value=0)
    | st.sampled_from([1e7, math.inf, math.nan]),
    "model.moe.eval_capacity_factor": st.floats(max_value=0),
    "model.moe.priority": st.text(max_size=8).filter(lambda name: name not in ("token", "choice")),
    "model.moe.group_rows": st.integers(-9, -1) | st.integers(17, 99),
    "model.moe.every": st.integers(-9, 0),
    "model.moe.first_dense": st.integers(-9, -1),
    "model.moe.shared_experts": st.integers(-9, -1),
    "model.moe.balance_weight": st.floats(max_value=-1e-9),
    "model.moe.balance_scope": st.text(max_size=8).filter(lambda name: name not in BALANCE_SCOPES),
    "model.moe.z_weight": st.floats(max_value=-1e-9),
    "model.moe.expert_dropout": st.floats(max_value=-1e-9) | st.floats(min_value=1),
    "model.moe.options.top_k.jitter": st.floats(min_value=1) | st.floats(max_value=-1e-9),
    "model.moe.options.top_k.logit_cap": st.floats(max_value=-1e-9),
    "model.moe.options.top_k.temperature": st.just(1.0),
    "model.moe.options.sigmoid_bias.expert_groups": st.sampled_from([-1, 0, 3, 9]),
    "model.moe.options.sigmoid_bias.top_groups": st.integers(-9, 0) | st.integers(2, 9),
    "model.moe.options.sigmoid_bias.routed_scale": st.floats(max_value=0),
    "model.moe.options.sigmoid_bias.update_rate": st.floats(max_value=-1e-9),
    "model.moe.options.hash.table_size": st.integers(-9, 7),
    "model.moe.options.hash.seed": st.integers(-9, -1),
    "model.moe.options.dropless.recv_factor": st.floats(1e-9, 0.99) | st.floats(max_value=-1e-9),
    # Keys of model.moe.
    "model.moe.options.capacity.priority": st.just("batch"),
    "model.moe.options.top_k.balance_scope": st.just("group"),
    "model.width": st.integers(-9, 0),
    "model.remat": st.text(max_size=8).filter(lambda name: name not in REMAT),
    "mesh.data": st.integers(-9, -2) | st.integers(9, 99) | st.just(0) | st.just(3),
    "mesh.expert": st.sampled_from([0, 3, 5, 6, 7, 16, -2]),
    "train.batch_size": st.integers(-9, 7) | st.integers(9, 15),
    "train.accumulation": st.integers(-9, 0) | st.integers(3, 15),
    "precision": st.text(max_size=8).filter(lambda name: name not in PRECISIONS),
    "seed": st.integers(-9, -1),
}
KINDS = st.none() | st.just("word") | st.lists(st.integers(), max_size=2) | st.booleans()
WORDS = ("router", "dispatch", "priority", "scope", "remat", "precision", "temperature")
NUMBERS = [key for key in ILLEGAL if not key.endswith(WORDS)]  # none of KINDS is one


@st.composite
def illegal(draw) -> tuple[str, object]:
    """Draw a key of the config and an illegal value."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(NUMBERS)), draw(KINDS)
    key = draw(st.sampled_from(sorted(ILLEGAL)))
    return key, draw(ILLEGAL[key])


def settled(changes: dict[str, object]) -> None:
    """Check a changed config as the trainer does before it compiles anything."""
    plain = default_config().to_dict()
    legal = {"mesh.expert": 4, "mesh.data": 2, "train.batch_size": 16, "model.moe.top_k": 2}
    for key, value in (legal | changes).items():
        *path, last = key.split(".")
        if "options" in path:  # options are checked only if their owner is in use
            table = "dispatch" if path[-1] in DISPATCH else "router"
            plain["model"]["moe"][table] = path[-1]
        node = plain
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    resolve(from_config_dict(plain), 8, 258)


def refused(change) -> None:
    key, value = change
    with pytest.raises(UserError) as error:
        settled({key: value})
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence


def test_the_config_without_a_change_is_legal():
    settled({})


@pytest.mark.parametrize("value", [None, "0.1", [0.1], True])
def test_an_option_of_another_type_is_refused_by_name(value):
    """The test below found this: options were passed on unchecked."""
    with pytest.raises(UserError, match=r"config.model.moe.options.top_k.jitter is .* float\.$"):
        settled({"model.moe.options.top_k.jitter": value})


@pytest.mark.parametrize("part", CONFIG_PARTS)
def test_illegal_configs_are_refused_in_one_sentence(part):
    drawn(refused, illegal(), part)
