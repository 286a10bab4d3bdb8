"""The ledger against a count of single assignments, and the command that prints it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cli.ledger import main
from moe_jax.errors import UserError
from moe_jax.moe.accounting import POSITION_BUCKETS, count_outcomes
from moe_jax.moe.types import (
    ExpertChoice,
    Mean,
    MoEAux,
    MoEContext,
    Outcomes,
    RouterAux,
    TokenChoice,
)
from moe_jax.record.report import LEDGER
from moe_jax.tools import ledger as command
from moe_jax.train.metrics import ledger_row

B, T, K, E, SOURCES, ROWS = 6, 12, 2, 5, 3, 2
G, S = B // ROWS, ROWS * T


def some(seed=0):
    """Draw assignments, which of them are kept, and the context of their tokens."""
    rng = np.random.default_rng(seed)
    choice = TokenChoice(
        jnp.asarray(rng.integers(0, E, (G, S, K)), jnp.int32),
        jnp.ones((G, S, K)),
        jnp.asarray(rng.random((G, S, K)) < 0.8),
    )
    mask_BT = jnp.asarray(rng.random((B, T)) < 0.9)
    real = choice.valid_GSK & mask_BT.reshape(G, S, 1)
    kept_GSK = real & jnp.asarray(rng.random((G, S, K)) < 0.7)
    context = MoEContext(
        token_ids_BT=jnp.zeros((B, T), jnp.int32),
        mask_BT=mask_BT,
        row_keys_B=jax.random.split(jax.random.key(0), B),
        mesh=None,
        group_rows=ROWS,
        train=True,
        sources_BT=jnp.asarray(rng.integers(0, SOURCES, (B, T)), jnp.int32),
        num_sources=SOURCES,
    )
    return choice, kept_GSK, context


def one_by_one(choice, kept_GSK, context, cause):
    """Count assignments one by one: {(axis, place, outcome): count}."""
    counts = {}
    for g, s, k in np.ndindex(kept_GSK.shape):
        row, t = g * ROWS + s // T, s % T
        outcome = cause
        if not context.mask_BT[row, t]:
            outcome = "padding"
        elif not choice.valid_GSK[g, s, k]:
            outcome = "unsampled"
        elif kept_GSK[g, s, k]:
            outcome = "kept"
        places = {
            "expert": int(choice.ids_GSK[g, s, k]),
            "position": t * POSITION_BUCKETS // T,
            "source": int(context.sources_BT[row, t]),
        }
        for axis, place in places.items():
            counts[axis, place, outcome] = counts.get((axis, place, outcome), 0) + 1
    return counts


@pytest.mark.parametrize("cause", ["dropped_capacity", "dropped_buffer"])
def test_every_assignment_is_counted_where_it_belongs(cause):
    choice, kept_GSK, context = some()
    stats, ledger = count_outcomes(choice, choice, kept_GSK, cause, E, context)
    expected = one_by_one(choice, kept_GSK, context, cause)
    found = {
        (axis, place, outcome): int(count)
        for axis, outcomes in ledger._asdict().items()
        for outcome, counts in outcomes._asdict().items()
        for place, count in enumerate(counts)
        if count
    }
    assert found == expected
    assert stats.conserved() and stats.assignments == G * S * K
    lost = context.mask_BT.reshape(G, S) & ~kept_GSK.any(-1)
    assert stats.lost_tokens == lost.sum()


def test_a_choice_of_experts_has_their_slots_as_assignments():
    C = 3
    rng = np.random.default_rng(1)
    tokens = np.stack([rng.permutation(S)[:C] for _ in range(G * E)]).reshape(G, E, C)
    choice = ExpertChoice(jnp.asarray(tokens, jnp.int32), jnp.ones((G, E, C)))
    _, _, context = some()
    by_token = choice.by_token(S)
    kept = by_token.valid_GSK & context.mask_BT.reshape(G, S, 1)
    stats, ledger = count_outcomes(choice, by_token, kept, "dropped_capacity", E, context)
    assert stats.assignments == G * E * C and stats.conserved()
    np.testing.assert_array_equal(ledger.expert.total(), G * C)
    padding = ~np.asarray(context.mask_BT).reshape(G, S)
    assert stats.outcomes.padding == sum(padding[g][tokens[g]].sum() for g in range(G))


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / LEDGER).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows():
    """Write two rows of one layer, as the trainer does."""
    found = []
    for seed in (0, 1):
        choice, kept_GSK, context = some(seed)
        counted = count_outcomes(choice, choice, kept_GSK, "dropped_capacity", E, context)
        stats, ledger = jax.tree.map(lambda n: np.asarray(n)[None], counted)
        none = Mean(np.zeros(1), np.ones(1))
        moe = MoEAux(RouterAux(none, none, none), stats, ledger)
        found.append({"step": 10 * (seed + 1), **ledger_row(moe, ["a", "b", "c"])})
    return found


def test_rows_add_up(tmp_path, capsys):
    write(tmp_path, rows())
    code = main(["ledger", f"--workdir={tmp_path}", f"--csv={tmp_path / 'all.csv'}"])
    printed = capsys.readouterr().out
    assert code == 0
    assert "2 steps from 10 to 20" in printed and "exactly one column" in printed
    assert f"{2 * G * S * K:,}" in printed  # of the one layer
    totals = command.read(tmp_path / LEDGER)
    assert sum(int(n.sum()) for n in totals.ledger.source) == 2 * G * S * K
    lines = (tmp_path / "all.csv").read_text().splitlines()
    assert len(lines) == 1 + E + POSITION_BUCKETS + SOURCES
    later = command.read(tmp_path / LEDGER, from_step=11)
    assert later.steps == [20]


def test_a_count_that_is_off_is_reported(tmp_path, capsys):
    first, second = rows()
    first["source"]["kept"][0][1] += 1
    write(tmp_path, [first, second])
    assert main(["ledger", f"--workdir={tmp_path}"]) == 1
    assert "NOT CONSERVED: layer 0" in capsys.readouterr().out
    for axis in ("expert", "position", "source"):  # the same assignment is missing on every axis
        second[axis]["kept"][0][0] -= 1
    write(tmp_path, [second])
    assert main(["ledger", f"--workdir={tmp_path}"]) == 1
    assert "NOT CONSERVED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "cannot be read"),
        ("", "no step from 0"),
        ('{"step": 1}\n', "line 1, is damaged"),
        ("[" * 100_000 + "\n", "line 1, is damaged"),
        ('{"step": 1, "sources": [], "expert": {"kept": "x"}}\n', "line 1, is damaged"),
        ('{"step": 1, "sources": [], "expert": {}}\n', "line 1, is damaged"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / LEDGER).write_text(text)
    with pytest.raises(UserError, match=complaint):
        main(["ledger", f"--workdir={tmp_path}"])


def test_outcomes_add_in_the_order_of_their_fields():
    outcomes = Outcomes(*(np.array([10**i]) for i in range(5)))
    assert outcomes.sampled() == 111 and outcomes.total() == 11111
