"""docs/library.md: its code blocks run as written, in order; its public names are documented."""

import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import Any

import docstring_rules
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from old_workdir import unpack
from small_run import write_corpus

import moe_jax

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "library.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names that the page's code blocks defined, after all of them ran."""
    folder, back = tmp_path_factory.mktemp("library"), Path.cwd()
    write_corpus(folder / "texts")
    unpack(folder / "old")
    (folder / "runs").mkdir()
    (folder / "old" / "run").rename(folder / "runs" / "tiny")
    defined: dict = {"__name__": "library"}
    os.chdir(folder)
    try:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE, re.S), 1):
            run = compile(block, f"docs/library.md, block {number}", "exec")
            exec(run, defined)
    finally:
        os.chdir(back)
        moe_jax.ROUTERS.pop("sharp", None)
    return defined


@pytest.mark.lifecycle
def test_what_the_page_computes(names):
    for leaf in jax.tree.leaves(names["grads"]):
        assert np.isfinite(np.asarray(leaf)).all()
    assert names["net"].moe.deterministic
    np.testing.assert_array_equal(
        np.sign(names["state"].params["embed_VD"]).shape, names["model"].abstract["embed_VD"].shape
    )
    assert int(names["state"].step) == 3
    assert float(names["metrics"].loss.total) < 7
    assert names["logits_BTV"].shape == (2, 16, 258) and names["study"].load_E.sum() == 4 * 16 * 2
    tokens = np.asarray(names["tokens"])[None]
    np.testing.assert_array_equal(names["again"].logits(tokens), names["tiny"].logits(tokens))


@pytest.mark.lifecycle
def test_the_routers_state_of_the_page_follows_the_load(names):
    layer = names["layer"]
    assert layer.router == names["Sharp"](temperature=0.5) == names["same"].router


def public() -> dict[str, Any]:
    """Functions and classes in the namespaces, in their tables, and in the signatures of these."""
    spaces = {"moe_jax": moe_jax, "moe_jax.data": moe_jax.data, "moe_jax.ops": moe_jax.ops}
    found = {
        f"{title}.{name}": inspect.unwrap(getattr(space, name))
        for title, space in spaces.items()
        for name in space.__all__
    }
    tables = {"ROUTERS": moe_jax.ROUTERS, "DISPATCH": moe_jax.DISPATCH}
    found |= {f"{t}[{name!r}]": kind for t, table in tables.items() for name, kind in table.items()}
    found = {n: one for n, one in found.items() if inspect.isclass(one) or inspect.isfunction(one)}
    classes = {one for one in found.values() if inspect.isclass(one)}
    called = [one for one in found.values() if inspect.isfunction(one)]
    called += [method for cls in classes for method in docstring_rules.methods(cls)]
    for cls in sorted(docstring_rules.named_by(called, classes), key=str):
        found[f"{cls.__module__}.{cls.__name__}"] = cls
    return found


PUBLIC = public()
# Exported names that implement nothing published.  All others cite a reference.
WITHOUT_REFERENCE = {
    "moe_jax": """Config DataConfig Dispatch LoadedModel MeshConfig MoEContext Optimizer Router
        RouterIn StepOptions TokenChoice TrainState UserError define forward init init_router_state
        init_train_state jit_train_step load load_config make_dispatch make_mesh make_router
        make_train_step study_router""",
    "moe_jax.data": """Batch Batches DataConfig DeviceFeed HeldOut Store build_store load_tokenizer
        put_batch""",
}
OWN = {f"{space}.{name}" for space, names in WITHOUT_REFERENCE.items() for name in names.split()}
EXPORTED = [name for name in PUBLIC if name.count(".") < 3]
# They call functions that can raise UserError, but `define` has already refused such a model, and a
# Dropless with default knobs is never refused.
NEVER_RAISE = {
    "moe_jax.init": "moe_jax.init",
    "moe_jax.LoadedModel": "moe_jax.LoadedModel.module",
    "moe_jax.moe.components.Components": "moe_jax.moe.components.Components.without_drops",
}


def contract(cls: type) -> type | None:
    """The protocol that a class implements, which documents its methods."""
    if cls in moe_jax.ROUTERS.values() or issubclass(cls, moe_jax.LinearRouter):
        return moe_jax.Router
    return moe_jax.Dispatch if cls in moe_jax.DISPATCH.values() else None


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_say_what_they_take(name):
    found = PUBLIC[name]
    if inspect.isfunction(found):
        faults = docstring_rules.function_faults(name, found)
    else:
        faults = docstring_rules.class_faults(name, found, contract(found))
    known = [f"{NEVER_RAISE[name]} has no Raises with UserError"] if name in NEVER_RAISE else []
    assert list(faults) == known


def test_every_config_key_says_what_it_is():
    sections = [field.type for field in dataclasses.fields(moe_jax.Config)]
    faults = [
        fault
        for section in sections
        if dataclasses.is_dataclass(section)
        for fault in docstring_rules.field_faults(section.__name__, section)
    ]
    assert faults == []


def test_published_methods_have_a_reference():
    found = {
        name for name in EXPORTED if list(docstring_rules.reference_faults(name, PUBLIC[name]))
    }
    assert found == OWN


def test_layers_made_from_one_rngs_differ_and_the_first_is_the_seeds():
    from flax import nnx

    config, rngs = moe_jax.MoEConfig(num_experts=2, expert_width=4), nnx.Rngs(0)
    first, second = (moe_jax.MoE(config, 4, rngs=rngs) for _ in range(2))
    alone = moe_jax.MoE(config, 4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(first.w_in_EDUF[...], alone.w_in_EDUF[...])
    assert (np.asarray(first.w_in_EDUF[...]) != np.asarray(second.w_in_EDUF[...])).any()


def test_load_config_sets_keys_and_refuses_what_is_none():
    config = moe_jax.load_config(str(ROOT / "configs" / "tiny.py"), {"train.steps": 7})
    assert config.train.steps == 7
    with pytest.raises(moe_jax.UserError, match=r"train\.stepz is not a config key"):
        moe_jax.load_config(str(ROOT / "configs" / "tiny.py"), {"train.stepz": 7})


@pytest.mark.lifecycle
def test_the_module_equals_the_forward_pass(x64):
    """In float64, with experts in every other layer, packed documents and a stateful router."""
    from flax import nnx

    moe = moe_jax.MoEConfig(
        num_experts=4, expert_width=8, every=2, router="sigmoid_bias", group_rows=2
    )
    shape = moe_jax.ModelConfig(
        vocab_size=32,
        num_layers=2,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_width=16,
        confine_attention=True,
        moe=moe,
    )
    module = moe_jax.Transformer(shape, dtype=jnp.float64, rngs=nnx.Rngs(params=jax.random.key(3)))
    model = moe_jax.define(shape, jnp.float64)
    params = jax.jit(lambda key: moe_jax.init(model, key))(jax.random.key(3))
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)
    segments_BT = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 0]), 4), (2, 12))
    state = {"bias": jnp.array([[0.3, -0.2, 0.1, 0.0]])}
    graph, values = nnx.split(module)

    @jax.jit
    def called(values):
        return nnx.merge(graph, values)(tokens_BT, segments_BT=segments_BT, router_state=state)

    got = called(values)
    mesh = moe_jax.make_mesh(moe_jax.MeshConfig(data=1), jax.devices()[:1])
    context = moe_jax.MoEContext(
        token_ids_BT=tokens_BT,
        mask_BT=segments_BT > 0,
        row_keys_B=jax.random.split(jax.random.key(0), 2),
        mesh=mesh,
        train=False,
        router_state=state,
    )
    positions_BT = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))

    @jax.jit
    def passed(params):
        return moe_jax.forward(model, params, tokens_BT, positions_BT, segments_BT, context)[0]

    x_BTD = passed(params)
    np.testing.assert_allclose(got, x_BTD @ params["head_DV"], rtol=0, atol=1e-10)
