"""The doctor on a small run: all checks pass once, then each check fails once."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_run import ROOT, flags, small_config, write_corpus

from moe_jax.config import Config, from_config_dict
from moe_jax.config_file import read_config_file
from moe_jax.model import transformer
from moe_jax.model.define import ModelDef
from moe_jax.moe import components, layer
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.routers import ROUTERS, hash, linear, top_k
from moe_jax.moe.types import Mean
from moe_jax.nn.params import truncated_normal
from moe_jax.run import resolve, restore, setup
from moe_jax.tools.doctor import balance, balance_pull, branch_scale, fit, learning, spread, start
from moe_jax.tools.doctor.checks import CHECKS
from moe_jax.tools.doctor.examine import attempt, examine, make_subject
from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.shrink import (
    changes,
    limit_text,
    named_devices,
    shrink,
    shrink_mesh,
    without_warmup,
)
from moe_jax.tools.doctor.subject import Steps, Subject
from moe_jax.tools.doctor.walk import walk_blocks
from moe_jax.train.optim import Optimizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("doctor_text"))


@pytest.fixture(scope="module")
def patch():
    """A monkeypatch for the whole module."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def subject_of(folder, corpus: str, **overrides) -> Subject:
    config = small_config(corpus, **overrides)
    return make_subject(config, 0, folder / "run", lambda line: None)


@pytest.fixture(scope="module")
def well(tmp_path_factory, corpus, patch) -> tuple[Subject, dict[str, Finding], list[str]]:
    """A healthy subject, the findings of all checks, and the printed lines."""
    patch.setattr(balance, "BALANCE_SCOPES", ("group",))  # each scope is compiled twice
    subject, lines = subject_of(tmp_path_factory.mktemp("well"), corpus), []
    found: dict[str, Finding] = {}

    def keep(name, check):
        def kept(subject):
            found[name] = check(subject)
            return found[name]

        return kept

    checks = {name: keep(name, check) for name, check in CHECKS.items()}
    failed = examine(subject, checks, lines.append)
    assert failed == 0, "\n".join(lines)
    return subject, found, lines


@pytest.fixture(scope="module")
def ill(tmp_path_factory, corpus) -> Subject:
    """A subject with several faults, so that the model is compiled only once for all of them."""
    folder = tmp_path_factory.mktemp("ill")
    with pytest.MonkeyPatch.context() as patch:
        route = top_k.TopK.route

        def cut(self, inputs, params, state):
            choice, aux = route(self, inputs, params, state)
            return choice._replace(weights_GSK=jax.lax.stop_gradient(choice.weights_GSK)), aux

        patch.setattr(top_k.TopK, "route", cut)
        patch.setattr(layer, "residual_fan_in", lambda size, *scaling: truncated_normal(10.0))
        patch.setattr(transformer, "fan_in", lambda size: truncated_normal(2.0))
        subject = subject_of(folder, corpus, model__moe__capacity_factor=0.1)
        start.residual_scale(subject)
        assert subject.probe.moe is not None  # evaluated while the faults are planted
        return subject


@pytest.mark.lifecycle
def test_every_check_has_a_figure(well):
    _, found, lines = well
    assert list(found) == list(CHECKS) and len(CHECKS) >= 15
    for name, line in zip(CHECKS, lines, strict=True):
        assert re.fullmatch(rf"ok    {re.escape(name)} +\S.*\d.*", line), line


def test_a_dense_model_has_no_experts_to_check(tmp_path, corpus):
    subject = subject_of(tmp_path, corpus, model__dense=True)
    checks = (start.expert_init, start.capacity, balance.balance_gradient)
    for check in (*checks, branch_scale.branch_scale, balance_pull.balance_pull):
        assert check(subject) == start.NO_EXPERTS
    assert spread.load_spreads(subject, 3, print) == start.NO_EXPERTS
    assert learning.router_gradient(subject) == balance.balance_at_uniform(subject)
    assert "1 device" in fit.divides(subject).figure


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (start.expert_init, "fan-in of one expert"),
        (start.first_loss, "output head"),
        (start.activations, "1 / sqrt(2 L)"),
        (start.capacity, "model.moe.capacity_factor"),
        (learning.router_gradient, "combine weights"),
        (learning.gradients_arrive, "blocks/1/ffn/router_kernel"),
    ],
)
def test_faults_of_model_and_config_are_seen(ill, check, says):
    finding = attempt(check, ill)
    assert not finding.ok and says in finding.fix, finding


@pytest.mark.parametrize("router", ROUTERS)
def test_balance_is_one_at_uniform_for_every_router(router):
    moe = MoEConfig(num_experts=8, top_k=2, router=router)
    made = components.make_router(moe)
    finding = balance.uniform_balance(made, dataclasses.replace(moe, top_k=made.choices_per_token))
    assert finding.figure.startswith("1.000")
    by_construction = router in ("soft", "expert_choice")
    assert finding.ok and ("by construction" in finding.figure) == by_construction


def test_balance_that_is_always_one_is_seen(monkeypatch):
    monkeypatch.setattr(
        linear, "balance_loss", lambda *arrays, **knobs: Mean(np.float32(1), np.float32(1))
    )
    finding = balance.uniform_balance(components.make_router(MoEConfig()), MoEConfig())
    assert not finding.ok and "1.00 if all tokens are equal" in finding.figure


def test_a_table_that_cannot_be_even_is_no_fault_of_the_loss(monkeypatch):
    """12 ids over 8 experts give shares of 2/12 and 1/12: 8 * (4 * 4 + 4) / 144 = 1.11."""
    moe = MoEConfig(router="hash", top_k=1, options={"hash": {"table_size": 12}})
    router = components.make_router(moe)
    finding = balance.uniform_balance(router, moe)
    assert finding.ok and "load of its assignments gives 1.11" in finding.figure, finding

    whole = hash.balance_loss

    def doubled(*arrays, **knobs):
        mean = whole(*arrays, **knobs)
        return Mean(2 * mean.sum, mean.count)

    monkeypatch.setattr(hash, "balance_loss", doubled)
    assert not balance.uniform_balance(router, moe).ok


def test_balance_divided_by_k_is_seen(well, monkeypatch):
    whole = linear.balance_loss

    def divided(probs_GSE, ids_GSK, mask_GS, **knobs):
        mean = whole(probs_GSE, ids_GSK, mask_GS, **knobs)
        return Mean(mean.sum / ids_GSK.shape[-1], mean.count)

    monkeypatch.setattr(linear, "balance_loss", divided)
    finding = balance.balance_at_uniform(well[0])
    assert not finding.ok and finding.figure.startswith("0.5000")


@pytest.mark.lifecycle
def test_balance_that_depends_on_accumulation_is_seen(well, monkeypatch):
    whole = linear.balance_loss
    monkeypatch.setattr(
        linear,
        "balance_loss",
        lambda *arrays, scope, rows: whole(*arrays, scope="global", rows=rows),
    )
    finding = balance.balance_gradient(well[0])
    assert not finding.ok and "scope group" in finding.figure


def test_parameter_left_out_of_the_step_is_named(tmp_path, corpus, monkeypatch):
    def without(config: Config, model: ModelDef) -> Optimizer:
        return Optimizer(config.optimizer, config.train.steps, frozen=("embedding",))

    monkeypatch.setattr(setup, "make_optimizer", without)
    finding = learning.step_changes(subject_of(tmp_path, corpus))
    assert not finding.ok and finding.fix.endswith("changes: embed_VD.")


def test_leaf_that_comes_back_changed_is_named(well, monkeypatch):
    whole = restore.from_disk

    def off_by_one_bit(*arguments):
        state = whole(*arguments)
        table = np.array(state.params["embed_VD"])
        table.view(np.uint32)[3, 1] ^= 1
        params = {**state.params, "embed_VD": jax.device_put(table)}
        return dataclasses.replace(state, params=params)

    monkeypatch.setattr(restore, "from_disk", off_by_one_bit)
    finding = fit.saves_bitwise(well[0])
    assert not finding.ok and "params/embed_VD changed" in finding.fix


def test_accelerator_that_is_too_small_or_starved_is_seen(well, monkeypatch):
    chip = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    subject = dataclasses.replace(well[0], shrunk=False, devices=[chip])
    assert not fit.memory(subject).ok
    steps = Steps({}, skipped=False, wait=0.2, seconds=1.0)
    monkeypatch.setattr(subject, "first_steps", lambda: steps)
    assert not fit.data_wait(subject).ok
    steps = Steps({}, skipped=True, wait=0.0, seconds=1.0)
    monkeypatch.setattr(subject, "first_steps", lambda: steps)
    assert "skipped" in learning.step_changes(subject).figure


def test_experts_count_singly_and_only_where_a_token_came(well):
    subject = dataclasses.replace(well[0])
    kept = np.ones_like(well[0].probe.kept)
    kept[0, 2] = 0
    norms = {"blocks/1/ffn/w_in_EDUF": np.array([1.0, 0.0, 0.0, *[1.0] * 5])}
    subject.__dict__["probe"] = well[0].probe._replace(kept=kept, gradients=norms)
    finding = learning.gradients_arrive(subject)
    assert not finding.ok and "w_in_EDUF[1]." in finding.fix
    assert "no token reached layer 1 expert 2;" in finding.figure


def at_init(subject: Subject) -> Subject:
    """The same subject before its first step."""
    fresh = dataclasses.replace(subject)
    fresh._state = restore.fresh_state(subject.run, "", lambda line: None)
    return fresh


def first_number(finding: Finding) -> float:
    return float(re.findall(r"\d[\d.e-]*", finding.figure)[0])


def test_figures_of_the_moe_layer_are_those_of_numpy(well):
    """The balance gradient from its formula; the dense twin from ten draws of its weights."""
    subject, found, _ = well
    fresh = at_init(subject)

    def measure(block, context, run):
        layer, seen = block.ffn, []

        def recorded(x_BTD, context):
            out_BTD, aux = layer(x_BTD, context)
            seen.extend((x_BTD, out_BTD))
            return out_BTD, aux

        if hasattr(layer, "router_kernel"):
            block.ffn = recorded
        return run(), tuple(seen)

    [_, (x, out)] = walk_blocks(fresh, measure, train=True)
    config = subject.config.model
    B, T, D = x.shape
    groups = B // config.moe.group_rows
    kernel = np.asarray(fresh.state().params["blocks"]["1"]["ffn"]["router_kernel"], np.float64)
    E = kernel.shape[1]
    tokens = np.asarray(x, np.float64).reshape(groups, -1, D)
    gradient = np.zeros_like(kernel)
    for x_SD in tokens:
        p_SE = np.exp(x_SD @ kernel)
        p_SE /= p_SE.sum(1, keepdims=True)
        f_E = np.bincount(np.argsort(-p_SE, 1)[:, :2].ravel(), minlength=E) / (2 * len(x_SD))
        gradient += x_SD.T @ (p_SE * (f_E - (p_SE @ f_E)[:, None])) * E / (B * T)
    ratio = np.linalg.norm(gradient) / subject.probe.gradients["blocks/1/ffn/router_kernel"]
    pull = found["balance gradient to the router"]
    assert first_number(pull) == pytest.approx(config.moe.balance_weight * ratio, rel=0.06)

    draw, F = np.random.default_rng(0), 2 * config.moe.expert_width
    flat, twins = tokens.reshape(-1, D), []
    for _ in range(10):
        gate, up = draw.normal(size=(2, D, F)) / np.sqrt(D)
        down = draw.normal(size=(F, D)) / np.sqrt(F * 2 * config.num_layers)
        hidden = flat @ gate / (1 + np.exp(-flat @ gate)) * (flat @ up)
        twins.append(np.sqrt(((hidden @ down) ** 2).mean()))
    ratio = np.sqrt((np.asarray(out, np.float64) ** 2).mean()) / np.mean(twins)
    branch = found["MoE output against its dense twin"]
    assert first_number(branch) == pytest.approx(ratio, rel=0.25)


def test_experts_at_four_times_their_scale_are_seen(well):
    subject, found, _ = well
    large = at_init(subject)
    state = large.state()
    ffn = state.params["blocks"]["1"]["ffn"]
    params = {**state.params, "blocks": {**state.params["blocks"]}}
    params["blocks"]["1"] = {
        **params["blocks"]["1"],
        "ffn": {**ffn, "w_out_EFD": 4 * ffn["w_out_EFD"]},
    }
    large._state = dataclasses.replace(state, params=params)
    finding = branch_scale.branch_scale(large)
    before = first_number(found["MoE output against its dense twin"])
    assert first_number(finding) == pytest.approx(4 * before, rel=0.03)
    assert finding.warns and "In layer 1" in finding.fix and "do not explain" in finding.fix


def test_steps_start_at_the_initial_parameters_and_write_nothing(well, monkeypatch):
    subject, _, _ = well
    monkeypatch.setattr(spread, "PROGRESS", 0.0)
    folder, lines = subject.run.workdir.parent, []
    before = sorted(folder.rglob("*"))
    trained = spread.train(subject, 3, lines.append)
    assert sorted(folder.rglob("*")) == before
    assert (trained.load_NLE[0] == subject.probe.moe.load_E).all()
    tokens = subject.config.train.batch_size * subject.config.data.sequence_length
    assert (trained.load_NLE.sum(2) == 2 * tokens).all() and trained.skipped == 0
    assert trained.lm_N[0] == pytest.approx(subject.probe.loss, rel=1e-4)
    assert trained.lm_N[2] < trained.lm_N[0]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]


def test_steps_warm_up_over_at_most_a_third(well):
    optimizer = dataclasses.replace(well[0].plan.asked.optimizer, warmup_steps=2000)
    asked = dataclasses.replace(well[0].plan.asked, optimizer=optimizer)
    subject = dataclasses.replace(well[0], plan=dataclasses.replace(well[0].plan, asked=asked))
    run = spread._with_warmup(subject, 30)
    rates = [float(run.optimizer.schedule(step, None)) for step in (0, 9, 29)]
    peak = optimizer.learning_rate
    assert rates == pytest.approx([peak / 10, peak, peak])


def test_on_an_accelerator_the_config_itself_runs(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    config, lines = small_config(corpus), []
    subject = make_subject(config, 0, tmp_path / "run", lines.append)
    assert not subject.shrunk and lines == [f"the config itself on {len(jax.devices())} x cpu"]
    assert subject.config == without_warmup(subject.plan.config) and subject.run.mesh.size == 8


def test_a_check_that_breaks_ends_no_other(well):
    def breaks(subject):
        raise ZeroDivisionError("by\nzero")

    lines = []
    checks = {"first": breaks, "second": lambda subject: Finding(True, "1")}
    assert examine(well[0], checks, lines.append) == 1
    assert [line[:5].strip() for line in lines] == ["FAIL", "", "ok"]
    assert lines[1].strip() == "Fix the cause of ZeroDivisionError: by zero"


def test_command_says_in_one_sentence_what_does_not_fit(run_cli, corpus, tmp_path):
    arguments = [*flags(tmp_path, corpus), "--devices=3", "--config.mesh.expert=2"]
    done = run_cli(["moe_jax", "doctor", *arguments])
    assert done.code == 1 and "Traceback" not in done.err
    first, second = done.out.splitlines()
    assert first.startswith("FAIL  mesh, batch and groups divide")
    assert second.strip().startswith("mesh data -1 x fsdp 1 x expert 2")


def load(path) -> ConfigDict:
    return read_config_file(str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_shrunk_config_keeps_its_choices_and_fits(path):
    loaded = load(path)
    loaded.data.tokenizer = "bytes"  # learning.py names a file that benchmarks/corpus builds
    config = from_config_dict(loaded)
    mesh = shrink_mesh(config.mesh)
    devices = named_devices(mesh)
    small = shrink(config, mesh.resolve(devices))
    assert devices <= 8
    resolve.resolve(small, devices, tokenizer_vocab=259)
    old, new = config.model, small.model
    for name in ("router", "dispatch", "top_k", "every", "priority", "balance_scope", "options"):
        assert getattr(new.moe, name) == getattr(old.moe, name), name
    for name in ("activation", "qk_norm", "tied_head", "scan_layers", "remat", "dense"):
        assert getattr(new, name) == getattr(old, name), name
    assert new.moe_layers >= min(2, old.moe_layers) and new.width <= 64
    assert f"model.width {old.width} -> {new.width}" in changes(config, small)


def test_mesh_that_needs_more_devices_is_halved():
    config = load(ROOT / "configs" / "gshard.py")
    config.update({"mesh": {"expert": 32}})
    mesh = shrink_mesh(from_config_dict(config).mesh)
    assert mesh.expert == 8 and mesh.data == -1


def test_text_that_is_large_or_absent_is_replaced(corpus):
    data = small_config(corpus).data
    assert limit_text(data, 2**20) == data
    assert limit_text(data, 10).source == "stdlib"
    assert limit_text(dataclasses.replace(data, files="/absent/*"), 2**20).source == "stdlib"
