"""The metrics of a run: all are present, counts are conserved, held-out losses are correct."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented_fields import differences, documented, fields, written
from small_run import WORDS, eval_rows, flags, rows, small_config, train_rows, write_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_jax.cli.train import main
from moe_jax.data.pipeline import HeldOut
from moe_jax.model.define import define
from moe_jax.model.forward import forward, head_weight
from moe_jax.moe.types import MoEContext, Outcomes
from moe_jax.record.report import LEDGER, METRICS, is_last
from moe_jax.run.evaluate import Evaluator
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare
from moe_jax.train.metrics import moe_row
from moe_jax.watch.timekeeper import GOODPUT

STEPS = 6
LOGGED = (
    "step loss lm_loss balance_loss z_loss grad_norm learning_rate tokens tokens_per_second "
    "step_seconds data_wait_seconds model_tflops_per_second mfu assignments kept dropped padding "
    "unaccounted drop_fraction load_max_over_mean dead_experts router_entropy layers"
)
# 8 documents make about three batches, so that six steps include the padded row at the end of an
# epoch; gshard leaves some second choices unsampled, and a small capacity drops.
OVERRIDES = {
    "model.num_layers": 3,
    "model.moe.every": 1,
    "model.moe.first_dense": 1,
    "model.moe.router": "gshard",
    "model.moe.capacity_factor": 1.0,
    "model.moe.eval_capacity_factor": 1.0,
    "train.steps": STEPS,
    "train.ledger_every": 4,
    "train.debug": True,
    "optimizer.warmup_steps": 4,
    "eval.every": 4,
    "eval.rows": 0,
}
MOE_LAYERS, TOP_K, ROWS, T = 2, 2, 32, 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("metrics") / "text", 8)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, corpus):
    """A run of a few steps on 8 devices."""
    folder = tmp_path_factory.mktemp("metrics") / "run"
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train", *flags(folder, corpus, **OVERRIDES)]) == 0
    signal.signal(signal.SIGTERM, before)
    return folder


def test_rows_of_steps(workdir):
    logged = train_rows(workdir)
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    for row in logged:
        assert set(LOGGED.split()) <= set(row)
        assert row["tokens"] == row["step"] * ROWS * T
        assert row["mfu"] is None  # the peak of a CPU is unknown
        config = small_config("", **OVERRIDES)
        assert row["loss"] == pytest.approx(
            row["lm_loss"]
            + config.model.moe.balance_weight * row["balance_loss"]
            + config.model.moe.z_weight * row["z_loss"],
            rel=1e-6,
        )
        per_layer = {name: values for name, values in row["layers"].items()}
        assert {len(values) for values in per_layer.values()} == {MOE_LAYERS}
        assert row["load_max_over_mean"] == max(per_layer["load_max_over_mean"])
        assert row["dead_experts"] == sum(per_layer["dead_experts"])
    assert [row["learning_rate"] for row in logged[:3]] == pytest.approx([0.00075, 0.0015, 0.00225])


def test_counts_are_conserved(workdir):
    logged = train_rows(workdir)
    for row in logged:
        assert row["assignments"] == ROWS * T * TOP_K * MOE_LAYERS
        parts = ("kept", "dropped", "unsampled", "padding")
        assert sum(row[name] for name in parts) == row["assignments"]
        assert row["padding"] == (ROWS * T - row["step_tokens"]) * TOP_K * MOE_LAYERS
        sampled = row["assignments"] - row["unsampled"] - row["padding"]
        assert row["drop_fraction"] == pytest.approx(row["dropped"] / sampled)
    for name in ("kept", "dropped", "unsampled", "padding"):
        assert any(row[name] for row in logged), f"the run never met {name}"


def test_held_out_rows(workdir):
    logged = eval_rows(workdir)
    assert [row["step"] for row in logged] == [4, STEPS]
    for row in logged:
        assert {"eval_loss", "eval_loss_nodrop", "eval_bits_per_byte"} <= set(row)
        assert row["eval_drop_fraction"] > 0 and row["eval_loss"] != row["eval_loss_nodrop"]
        # One token of this tokenizer is one byte.
        assert row["eval_bits_per_byte"] == pytest.approx(row["eval_loss"] / np.log(2))
        assert row["eval_loss_by_source"]
    assert rows(workdir)[-1] == logged[-1]


def test_held_out_loss_recomputed(workdir, corpus):
    """The readable dispatch paths, all windows in one batch; after the logits it is NumPy."""
    run = prepare(small_config(corpus, **OVERRIDES), workdir, lambda line: None, jax.devices()[:1])
    params = restore_or_init_state(run, "", lambda line: None).params
    # Use the batches of the run, because drops depend on the rows of a group.
    heldout = HeldOut(run.store, ROWS, T)
    found = dict.fromkeys(("einsum", "dense"), 0.0)
    targets = 0
    by_source = np.zeros(len(run.store.sources))
    for index in range(len(heldout)):
        batch = heldout.rows(index, np.arange(ROWS))
        targets += batch.loss_mask_BT.sum()
        for dispatch in found:
            nll_BT = np.where(batch.loss_mask_BT, _nll(run, params, batch, dispatch), 0)
            found[dispatch] += nll_BT.sum()
            if dispatch == "einsum":
                np.add.at(by_source, batch.sources_BT.ravel(), nll_BT.ravel())
    row = eval_rows(workdir)[-1]
    assert row["eval_tokens"] == targets == run.store.heldout.num_tokens - 1
    assert row["eval_loss"] == pytest.approx(found["einsum"] / targets, rel=1e-5)
    assert row["eval_loss_nodrop"] == pytest.approx(found["dense"] / targets, rel=1e-5)
    shares = [row["eval_loss_by_source"].get(name) for name in run.store.sources]
    assert [share is None for share in shares] == [total == 0 for total in by_source]


def _nll(run, params, batch, dispatch):
    batch = jax.tree.map(jnp.asarray, batch)
    moe = dataclasses.replace(run.config.model.moe, dispatch=dispatch, options={})
    model = define(dataclasses.replace(run.config.model, moe=moe), jnp.float32)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch.row_B)
    context = MoEContext(
        batch.tokens_BT,
        batch.segments_BT > 0,
        keys_B,
        run.mesh,
        train=False,
    )
    x_BTD, _ = forward(
        model, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT, context
    )
    logits_BTV = np.asarray(x_BTD, np.float64) @ np.asarray(head_weight(model, params), np.float64)
    top_BT = logits_BTV.max(-1)
    total_BT = top_BT + np.log(np.exp(logits_BTV - top_BT[..., None]).sum(-1))
    return total_BT - np.take_along_axis(logits_BTV, batch.targets_BT[..., None], -1)[..., 0]


def test_bits_per_byte_of_another_tokenizer(tmp_path, corpus):
    """The nats of all held-out tokens divided by their bytes, for any tokenizer.

    A document's bytes are spread evenly over its tokens.  The first token of the stream is not a
    target, so the sum of the first document lacks that token's share, which can differ from the
    token's own length.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    overrides = {
        "data.tokenizer": str(tmp_path / "tokenizer.json"),
        "eval.rows": 0,
        "train.batch_size": 8,
    }
    run = prepare(
        small_config(corpus, **overrides), tmp_path / "run", lambda line: None, jax.devices()[:1]
    )
    row = Evaluator(run)(restore_or_init_state(run, "", lambda line: None))

    bytes_run = prepare(
        small_config(corpus), tmp_path / "run", lambda line: None, jax.devices()[:1]
    )
    size = bytes_run.store.heldout.num_tokens  # the same documents with one token per byte
    [ids] = run.store.heldout.read([(0, run.store.heldout.num_tokens)])
    assert len(ids) < 0.6 * size
    tokens = ids.tolist().index(run.store.eos_id) + 1  # of the first document
    document = len(tokenizer.decode(ids[: tokens - 1].tolist()).encode()) + 1  # its bytes, with eos
    nats = row["eval_loss"] * row["eval_tokens"]
    counted = nats / np.log(2) / row["eval_bits_per_byte"]
    assert counted == pytest.approx(size - document // tokens, rel=1e-12)


def test_the_ledger_of_a_run(workdir):
    """Every fourth step and the last: along each axis the ledger adds up to the step's row."""
    ledger = [json.loads(line) for line in (workdir / LEDGER).read_text().splitlines()]
    assert [row["step"] for row in ledger] == [4, STEPS]
    logged = {row["step"]: row for row in train_rows(workdir)}
    for row in ledger:
        for axis in ("expert", "position", "source"):
            for outcome in ("kept", "dropped_capacity", "unsampled", "padding"):
                counts = np.sum(row[axis].get(outcome, 0))
                assert counts == logged[row["step"]][outcome], (axis, outcome)
        assert np.shape(row["expert"]["kept"])[0] == MOE_LAYERS
        assert logged[row["step"]]["unaccounted"] == 0


def test_every_field_is_defined(workdir):
    """docs/metrics.md lists exactly the fields of the files."""
    logged = written(workdir / METRICS)
    steps = [row for row in logged if "loss" in row]
    assert differences(steps, "Rows of train steps") == []
    # Only data.max_epochs adds the first, only recv_factor the second.
    evaluations = [row for row in logged if "loss" not in row]
    assert differences(evaluations, "Rows of evaluations", ["max_epochs"]) == []
    ledger = written(workdir / LEDGER)
    assert differences(ledger, LEDGER, ["AXIS.dropped_buffer"]) == []
    assert differences(written(workdir / GOODPUT), GOODPUT) == []


def test_fields_that_few_rows_have_are_defined():
    assert fields(moe_row(None)) < documented("Rows of train steps")
    outcomes = {name for name in documented(LEDGER) if name.startswith("AXIS.")}
    assert outcomes == {f"AXIS.{name}" for name in Outcomes._fields}
    assert is_last({"step": 3, "eval_loss": 1.0, "max_epochs": 2}, 9, 2)
    assert "max_epochs" in documented("Rows of evaluations")


def test_a_field_that_is_not_defined_is_found():
    said = documented(LEDGER)
    odd = {"step": 1, "expert": {"kept": [1], "fallen": [2]}}
    assert differences([fields(odd)], LEDGER, said) == [
        "AXIS.fallen is not defined below 'ledger.jsonl'"
    ]
    assert differences([said - {"sources"}], LEDGER) == ["sources is in no row"]
