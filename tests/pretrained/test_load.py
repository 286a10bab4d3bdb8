"""`load` returns a run's weights, and `logits` the model's output with them."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_trees import files_of as checkpoint_files
from checkpoint_trees import flip_bit
from small_run import eval_rows, write_corpus
from trained import copy_with, digest, files_of, tokens, train

import moe_jax
from moe_jax.checkpoint import Checkpoints
from moe_jax.data.build import build_store, store_root
from moe_jax.data.pipeline import HeldOut
from moe_jax.model.define import define, map_variables, split_model, value_of
from moe_jax.model.forward import forward, head_weight
from moe_jax.model.layout import to_layers
from moe_jax.moe.types import MoEContext
from moe_jax.pretrained import load as load_module
from moe_jax.pretrained import loaded_model


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with checkpoints of steps 4 and 8, trained on 8 devices; tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder / "run", write_corpus(folder / "text"))
    return folder / "run"


@pytest.fixture(scope="module")
def tiny(workdir) -> moe_jax.LoadedModel:
    return moe_jax.load(workdir)


def reference_logits(loaded: moe_jax.LoadedModel, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits of `forward` on the path that runs every expert on every token, in one group."""
    moe = dataclasses.replace(loaded.config.moe, dispatch="dense", options={})
    model = define(dataclasses.replace(loaded.config, moe=moe), jnp.float32)
    B, T = tokens_BT.shape
    ones_BT = jnp.ones((B, T), jnp.int32)
    ids_BT, positions_BT = jnp.asarray(tokens_BT, jnp.int32), jnp.tile(jnp.arange(T), (B, 1))
    keys_B = jax.random.split(jax.random.key(1), B)
    context = MoEContext(
        ids_BT, ones_BT > 0, keys_B, loaded.mesh, group_rows=B, train=False,
        router_state=loaded.router_state,
    )  # fmt: skip

    @jax.jit
    def last_norm(params):
        return forward(model, params, ids_BT, positions_BT, ones_BT, context)[0]

    x_BTD = np.asarray(last_norm(loaded.params))
    return x_BTD @ np.asarray(head_weight(model, loaded.params))


@pytest.mark.lifecycle
def test_the_newest_checkpoint_or_the_one_asked_for(workdir, tiny):
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert (tiny.step, digest(tiny)) == (8, checkpoints.digest(8))
    earlier = moe_jax.load(str(workdir), step=4)
    assert (earlier.step, digest(earlier)) == (4, checkpoints.digest(4)) != (4, digest(tiny))
    assert tiny.config.num_layers == 2 and tiny.config is tiny.run_config.model
    assert tiny.run_config.train.steps == 8


def test_the_home_folder(workdir, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir.parent))
    assert moe_jax.load(f"~/{workdir.name}").config == tiny.config
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.save("~/saved")
    assert (tmp_path / "saved" / "config.json").exists()


def test_logits_are_those_of_the_forward_pass(tiny):
    tokens_BT = tokens(3)
    logits_BTV = tiny.logits(tokens_BT)
    assert logits_BTV.shape == (3, 16, tiny.config.vocab_size) and logits_BTV.dtype == jnp.float32
    np.testing.assert_allclose(logits_BTV, reference_logits(tiny, tokens_BT), atol=1e-5)
    ids_T = tiny.tokenizer.encode("import os")
    assert tiny.logits(ids_T[None]).shape == (1, 9, 258)
    assert tiny.tokenizer.decode(ids_T) == "import os"


def test_the_loss_of_held_out_text_is_what_the_run_has_logged(workdir, tiny):
    config = tiny.run_config
    store = build_store(config.data, store_root(config.data, workdir))
    heldout = HeldOut(store, 8, config.data.sequence_length, False, config.eval.rows)
    total = count = 0.0
    for number in range(len(heldout)):
        batch = heldout.rows(number, np.arange(8))
        logits_BTV = np.asarray(tiny.logits(batch.tokens_BT), np.float64)
        log_sum_BT = np.log(np.exp(logits_BTV).sum(-1))
        hit_BT = np.take_along_axis(logits_BTV, batch.targets_BT[..., None], -1)[..., 0]
        total += ((log_sum_BT - hit_BT) * batch.loss_mask_BT).sum()
        count += batch.loss_mask_BT.sum()
    (row,) = eval_rows(workdir)
    assert count == row["eval_tokens"]
    assert total / count == pytest.approx(row["eval_loss_nodrop"], rel=1e-5)


def test_logits_do_not_look_ahead(tiny):
    tokens_BT = tokens(3)
    changed_BT = tokens_BT.copy()
    changed_BT[1, 9] = (changed_BT[1, 9] + 1) % 256
    before, after = np.asarray(tiny.logits(tokens_BT)), np.asarray(tiny.logits(changed_BT))
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    np.testing.assert_array_equal(after[1, :9], before[1, :9])
    assert (np.abs(after[1, 9:] - before[1, 9:]).max(-1) > 0).all()


def test_router_state_comes_along_and_decides(tiny, workdir):
    bias_LE = np.asarray(tiny.router_state["bias"])
    target = {"bias": jax.ShapeDtypeStruct(bias_LE.shape, bias_LE.dtype)}
    saved = Checkpoints(workdir / "checkpoints").restore_subtree(8, "router", target)
    np.testing.assert_array_equal(bias_LE, saved["bias"])
    without = dataclasses.replace(tiny, router_state={"bias": jnp.zeros_like(bias_LE)})
    tokens_BT = tokens(3)
    assert np.abs(without.logits(tokens_BT) - tiny.logits(tokens_BT)).max() > 1e-3


@pytest.mark.lifecycle
def test_on_a_mesh(tiny, workdir, mesh_of):
    mesh = mesh_of(fsdp=2, expert=2)
    split = moe_jax.load(workdir, mesh=mesh)
    experts = split.params["stack"]["0"]["ffn"]["w_in_EDUF"]
    assert experts.addressable_shards[0].data.size * 4 == experts.size
    for rows in (3, 4):  # 3 rows are padded to a multiple of 4
        logits_BTV = split.logits(tokens(rows))
        assert logits_BTV.shape[0] == rows
        np.testing.assert_allclose(logits_BTV, tiny.logits(tokens(rows)), atol=1e-5)


def test_another_compute_dtype(tiny, workdir):
    half = moe_jax.load(workdir, dtype="bfloat16")
    assert digest(half) == digest(tiny)
    logits_BTV, exact_BTV = half.logits(tokens(3)), tiny.logits(tokens(3))
    assert logits_BTV.dtype == jnp.float32
    # The mean, because a few tokens with nearly tied experts may be routed differently.
    distance = np.abs(np.asarray(logits_BTV) - exact_BTV).mean()
    assert 1e-4 < distance < 0.02 * np.abs(exact_BTV).mean()


@pytest.mark.lifecycle
def test_unrolled_layers_and_attention_of_another_platform(tiny, workdir, tmp_path):
    """One checkpoint serves every config of scanned layers and attention kernels."""
    model = {"scan_layers": False, "attention": "cudnn"}
    unrolled = copy_with(workdir, tmp_path / "run", model=model)
    flat = moe_jax.load(unrolled)
    assert "stack" in tiny.params and "stack" not in flat.params
    assert digest(flat) == digest(tiny)
    np.testing.assert_allclose(flat.logits(tokens(3)), tiny.logits(tokens(3)), atol=1e-5)


@pytest.mark.lifecycle
def test_scanned_layers_on_a_mesh_are_saved_layer_by_layer(tiny, workdir, tmp_path, mesh_of):
    moe_jax.load(workdir, mesh=mesh_of(data=2, tensor=2)).save(tmp_path / "saved")
    assert Checkpoints(tmp_path / "saved" / "checkpoints").digest(8) == digest(tiny)
    back = moe_jax.load(tmp_path / "saved")
    assert "stack" in back.params and digest(back) == digest(tiny)


def test_compiled_once_per_shape(tiny, monkeypatch):
    traced = []

    def counted(model, params, tokens_BT, *_):
        traced.append(tokens_BT.shape)
        return jnp.zeros((*tokens_BT.shape, model.config.width)), None

    monkeypatch.setattr(loaded_model, "forward", counted)
    fresh = dataclasses.replace(tiny)
    for shape in ((2, 8), (2, 8), (3, 8)):
        fresh.logits(np.zeros(shape, np.int32))
    assert traced == [(2, 8), (3, 8)]


def test_module_holds_the_same_weights(tiny):
    module = tiny.module()
    ids_BT = jnp.asarray(tokens(1))
    np.testing.assert_array_equal(module.embed(ids_BT), tiny.params["embed_VD"][ids_BT])
    params = map_variables(split_model(module)[2], value_of)
    expected = to_layers(tiny.params, tiny.model.layout)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert params["embed_VD"] is tiny.params["embed_VD"]  # no copy


def test_nothing_in_the_workdir_changes(workdir):
    before = files_of(workdir)
    for step in (None, 4):
        moe_jax.load(workdir, step=step).logits(tokens(1))
    assert files_of(workdir) == before


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    flip_bit(checkpoint_files(root, 8)[0])
    before = files_of(tmp_path / "run")
    assert moe_jax.load(tmp_path / "run").step == 4
    with pytest.raises(moe_jax.UserError, match=r"step 8 is bad \(.*\): load another step"):
        moe_jax.load(tmp_path / "run", step=8)
    assert files_of(tmp_path / "run") == before
    flip_bit(checkpoint_files(root, 4)[0])
    with pytest.raises(moe_jax.UserError, match=r"none of its checkpoints verifies \(newest: step"):
        moe_jax.load(tmp_path / "run")


def test_a_step_that_a_live_run_deletes_meanwhile(workdir, tmp_path, monkeypatch):
    """Retention removes the chosen step while it is loaded; the run has saved another one."""
    shutil.copytree(workdir, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    (root / "4").rename(tmp_path / "4")
    read_params = load_module.read_params

    def read(checkpoints, step, *rest):
        if step == 8:
            shutil.rmtree(root / "8")
            (tmp_path / "4").rename(root / "4")
        return read_params(checkpoints, step, *rest)

    monkeypatch.setattr(load_module, "read_params", read)
    assert moe_jax.load(tmp_path / "run").step == 4


def test_what_is_refused(workdir, tmp_path, mesh_of):
    def refused(sentence: str, path=workdir, **arguments):
        with pytest.raises(moe_jax.UserError) as error:
            moe_jax.load(path, **arguments)
        assert sentence in str(error.value)

    refused(
        f"load('{tmp_path / 'x'}'): no checkpoints/ in it: name the workdir of a run or a folder "
        f"that LoadedModel.save wrote.",
        tmp_path / "x",
    )
    refused(f"load('{workdir}'): no checkpoint of step 5: it has steps 4, 8.", step=5)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    refused("config.json, which describes its checkpoints, is missing", tmp_path / "new")
    shutil.copy(workdir / "config.json", tmp_path / "new")
    refused("its checkpoints/ is empty", tmp_path / "new")
    unresolved = copy_with(workdir, tmp_path / "0", model={"vocab_size": 0})
    refused("vocab_size in config.json is 0", unresolved)
    small = copy_with(workdir, tmp_path / "small", model={"vocab_size": 257})
    refused("the tokenizer bytes has 258 ids and the model only 257", small)
    wide = copy_with(workdir, tmp_path / "wide", model={"width": 64})
    refused("is float32[32,2,16] in the checkpoint and float32[64,2,16] in this config", wide)
    (tmp_path / "wide" / "config.json").write_text("{")
    refused("config.json is damaged", wide)

    for dtype in ("float16", "half a float"):
        refused(f"dtype is '{dtype}': use one of float32, bfloat16, float64", dtype=dtype)
    refused("dtype is float64 and the run computed in float32", dtype="float64")
    devices = np.array(jax.devices()[:2])
    refused(
        "The mesh has axes ('data',) but expert parallelism needs data, fsdp, expert, tensor: use "
        "moe_jax.make_mesh(), or pass no mesh.",
        mesh=jax.sharding.Mesh(devices, ("data",)),
    )
    explicit = jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "expert", "tensor"))
    refused("has axes that are not Auto: make it with axis_types=", mesh=explicit)
    refused("mesh expert (3) does not divide: pass a mesh of other", mesh=mesh_of(expert=3))


def test_token_ids_that_are_none(tiny):
    for given, sentence in (
        (np.zeros((1, 4), np.float32), "takes token ids, which are integers, not float32"),
        (np.zeros((1, 4), bool), "integers, not bool"),
        ([[1, 2], [3]], "takes rows of equal length"),
        (np.zeros(4, int), r"of shape \[B, T\], not \[4\]"),
        (np.zeros((2, 0), int), r"not \[2, 0\]: pass at least one token"),
        ([[1, 258]], "token id 258, and this model has ids 0 to 257: use LoadedModel.tokenizer"),
        ([[-1, 2**40]], "token id -1"),
    ):
        with pytest.raises(moe_jax.UserError, match=sentence):
            tiny.logits(given)


@pytest.mark.lifecycle
def test_a_float64_run(tiny, tmp_path):
    """The weights are float64, which JAX keeps only under jax_enable_x64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tiny.params)
        state = {name: leaf.astype(jnp.float64) for name, leaf in tiny.router_state.items()}
        config = dataclasses.replace(tiny.run_config, precision="float64")
        wide = dataclasses.replace(tiny, params=params, router_state=state, run_config=config)
        wide.save(tmp_path / "wide")
        logits_BTV = moe_jax.load(tmp_path / "wide").logits(tokens(3))
        assert logits_BTV.dtype == jnp.float64
    np.testing.assert_allclose(logits_BTV, tiny.logits(tokens(3)), atol=1e-5)
    with pytest.raises(moe_jax.UserError, match=r"computed in float64: call jax\.config\.update"):
        moe_jax.load(tmp_path / "wide")
    with pytest.raises(moe_jax.UserError, match="dtype is float32 and the run computed in float64"):
        moe_jax.load(tmp_path / "wide", dtype="float32")
