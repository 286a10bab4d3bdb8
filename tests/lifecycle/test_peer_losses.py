"""A whole model against Hugging Face transformers (the peer): logits, losses and gradients.

Both sides get the same weights.  Marked lifecycle: it needs torch and transformers, which only
`launch/test.sh --lifecycle` installs.  The peer shares no code with this framework except the lines
here that rename weights.

B rows, T positions, V vocabulary, D width, H heads, J key/value heads, A head size, E experts, U
gate and up, F expert width, L layers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.peers.shape import peer_shape
from moe_jax.config import Config
from moe_jax.data.config import DataConfig
from moe_jax.model.config import ModelConfig
from moe_jax.model.transformer import Transformer
from moe_jax.moe.balance import aux_loss
from moe_jax.moe.config import MoEConfig

pytestmark = pytest.mark.lifecycle

B, T, V = 3, 24, 61
MIXTRAL = ModelConfig(
    vocab_size=V,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    moe=MoEConfig(
        num_experts=8,
        top_k=2,
        expert_width=24,
        dispatch="dropless",
        balance_weight=0.5,  # heavy enough that its gradients show
        balance_scope="global",
        z_weight=0.0,  # the peer has no z-loss
    ),
)
# As many key/value heads as heads, q/k norms over all of them, weights that do not add up to 1.
# The capacity factor gives every expert a slot for every token, so no assignment is dropped.
OLMOE = dataclasses.replace(
    MIXTRAL,
    num_kv_heads=4,
    qk_norm="full",
    moe=dataclasses.replace(
        MIXTRAL.moe,
        top_k=3,
        dispatch="capacity",
        eval_capacity_factor=8 / 3,
        options={"top_k": {"renormalize": False}},
    ),
)


class Numbers(NamedTuple):
    """One side's results for a batch; gradients are those of cross-entropy plus balance loss."""

    logits_BTV: Any
    cross_entropy: Any
    balance_L: Any
    gradients: dict[str, Any]  # under the peer's names


def peer_names(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Convert a tree of our weights, or of their gradients, to the peer's names and axes."""

    def out_in(w, inputs: int):  # to the layout of torch.nn.Linear
        return w.reshape(np.prod(w.shape[:inputs]), -1).T

    named = {
        "model.embed_tokens.weight": params["embed_VD"],
        "model.norm.weight": params["norm"]["weight"],
        "lm_head.weight": params["head_DV"].T,
    }
    for layer, block in params["blocks"].items():
        attention, moe, at = block["attention"], block["ffn"], f"model.layers.{layer}"
        named |= {
            f"{at}.self_attn.q_proj.weight": out_in(attention["q_DHA"], 1),
            f"{at}.self_attn.k_proj.weight": out_in(attention["k_DJA"], 1),
            f"{at}.self_attn.v_proj.weight": out_in(attention["v_DJA"], 1),
            f"{at}.self_attn.o_proj.weight": out_in(attention["o_HAD"], 2),
            f"{at}.input_layernorm.weight": block["attention_norm"]["weight"],
            f"{at}.post_attention_layernorm.weight": block["ffn_norm"]["weight"],
            f"{at}.mlp.gate.weight": moe["router_kernel"].T,
            # The peer concatenates gate and up: U (gate first) is the outer axis, F the inner one.
            f"{at}.mlp.experts.gate_up_proj": moe["w_in_EDUF"]
            .reshape(*moe["w_in_EDUF"].shape[:2], -1)
            .swapaxes(1, 2),
            f"{at}.mlp.experts.down_proj": moe["w_out_EFD"].swapaxes(1, 2),
        }
        for norm in ("q_norm", "k_norm"):
            if norm in attention:
                named[f"{at}.self_attn.{norm}.weight"] = attention[norm]["weight"]
    return named


def ours(config: ModelConfig, tokens_BT: np.ndarray) -> tuple[dict[str, np.ndarray], Numbers]:
    """Compute our results; returns the weights under the peer's names, and the results."""
    graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    # Perturb the initial weights: norm weights of 1 would hide a norm in the wrong place.
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape), nnx.to_pure_dict(state)
    )

    def loss(params, tokens_BT):
        model = nnx.merge(graph, params)
        context = model.make_context(tokens_BT)
        out = model.apply(tokens_BT, context)
        nll_BTV = -jax.nn.log_softmax(out.logits)[:, :-1]
        nll = jnp.take_along_axis(nll_BTV, tokens_BT[:, 1:, None], -1).mean()
        balance = out.aux.router.balance
        return nll + aux_loss(out.aux, config.moe), (
            out.logits,
            nll,
            balance.sum / balance.count,
        )

    (_, numbers), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, jnp.asarray(tokens_BT)
    )
    return peer_names(jax.device_get(params)), Numbers(
        *jax.device_get(numbers), peer_names(jax.device_get(gradients))
    )


def peers(config: ModelConfig, weights: dict[str, np.ndarray], tokens_BT: np.ndarray) -> Numbers:
    """Compute the peer's results with our weights."""
    import torch
    import transformers
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    shape = peer_shape(Config(model=config, data=DataConfig(sequence_length=T)))
    kind = getattr(transformers, f"{shape['class']}Config")(**shape["model"])
    model = transformers.AutoModelForCausalLM.from_config(
        kind, dtype=torch.float32, attn_implementation="eager"
    ).train()
    model.load_state_dict({name: torch.tensor(w) for name, w in weights.items()}, strict=True)
    tokens = torch.tensor(tokens_BT, dtype=torch.int64)
    out = model(input_ids=tokens, labels=tokens)
    # One layer at a time, as in our loss; the peer's own loss pools the layers.  It sums over the K
    # assignments of a token; ours is their mean.
    moe = config.moe
    balance = torch.stack(
        [
            load_balancing_loss_func((logits,), moe.num_experts, moe.top_k) / moe.top_k
            for logits in out.router_logits
        ]
    )
    nll = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1)
    )
    (nll + moe.balance_weight * balance.mean()).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    plain = (part.detach().numpy() for part in (out.logits, nll, balance))
    return Numbers(*plain, gradients)


@pytest.mark.parametrize("config", [MIXTRAL, OLMOE], ids=["mixtral", "olmoe"])
def test_the_peers_numbers(config):
    """In float32 both sides have rounding errors of about 1e-6 of a quantity's largest element."""
    tokens_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    weights, found = ours(config, tokens_BT)
    expected = peers(config, weights, tokens_BT)
    assert set(found.gradients) == set(expected.gradients)
    pairs = {name: (found.gradients[name], value) for name, value in expected.gradients.items()}
    for name in ("logits_BTV", "cross_entropy", "balance_L"):
        pairs[name] = getattr(found, name), getattr(expected, name)
    for name, (a, b) in pairs.items():
        scale = np.abs(b).max()
        assert scale > 1e-4, f"{name} says nothing"
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale, err_msg=name)
