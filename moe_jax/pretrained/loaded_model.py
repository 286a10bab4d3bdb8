"""A trained model: its weights on a mesh, its tokenizer, and methods to evaluate and save it.

B rows, T positions, V vocabulary.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moe_jax.config import Config
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.eval.heldout import never_dropping
from moe_jax.model.config import ModelConfig
from moe_jax.model.define import ModelDef, Params, define
from moe_jax.model.forward import forward, head_weight
from moe_jax.model.layout import to_layers
from moe_jax.model.transformer import Transformer
from moe_jax.moe.types import MoEContext
from moe_jax.parallel.rules import sharding
from moe_jax.pretrained.folder import write_folder

TokenRows = Sequence[Sequence[int]] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained model, as `load` returns it.

    Attributes:
      run_config: the resolved config of the run that trained it.
      model: graph definitions, shapes and compute dtype.
      params: the parameter tree of `model`, on `mesh`.
      router_state: name -> [MoE layers, ...]; empty for most routers.
      tokenizer: converts text to token ids and token ids to text.
      tokenizer_name: "bytes", or the path that the tokenizer was read from.
      mesh: the mesh that holds the weights.
      step: the step of the checkpoint.
    """

    run_config: Config
    model: ModelDef
    params: Params
    router_state: dict[str, jax.Array]
    tokenizer: Tokenizer
    tokenizer_name: str
    mesh: Mesh
    step: int

    @property
    def config(self) -> ModelConfig:
        """The model's section of the config."""
        return self.model.config

    def logits(self, tokens_BT: TokenRows) -> Float[Array, "B T V"]:
        """The logits of the next token at every position of every row.

        No token is dropped, for any dispatch path and capacity of the run, so a row's logits do not
        depend on the other rows.  Compiled once per shape [B, T].

        Args:
          tokens_BT: token ids [B, T] without padding, at positions 0 to T - 1.  Any B.

        Returns:
          float32 [B, T, V] (float64 if the model computes in float64), V the model's vocabulary.

        Raises:
          UserError: `tokens_BT` is not a matrix of integers, or an id is not in the vocabulary.
        """
        tokens_BT = self._checked(tokens_BT)
        rows = len(tokens_BT)
        shards = self.mesh.size // self.mesh.shape["tensor"]
        padded_BT = np.pad(tokens_BT, ((0, -rows % shards), (0, 0)))
        on_mesh_BT = jax.device_put(padded_BT, sharding(self.mesh, ("batch", None)))
        logits_BTV = self._jitted_logits(self.params, self.router_state, on_mesh_BT)
        return logits_BTV if len(padded_BT) == rows else logits_BTV[:rows]

    def module(self) -> Transformer:
        """The model as a Flax NNX module with these weights and unrolled layers.

        It shares the arrays of this object, except those of scanned layers, which are sliced and
        thereby copied.

        Returns:
          A module in evaluation mode; call its `train()` for training mode.
        """
        config, parts, dtype = self.config, self.model.components, self.model.dtype
        module = nnx.eval_shape(lambda: Transformer(config, parts, dtype=dtype, rngs=nnx.Rngs(0)))
        params = to_layers(self.params, self.model.layout)
        blocks = {int(layer): block for layer, block in params["blocks"].items()}
        nnx.update(module, params | {"blocks": blocks})
        return module

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a folder that `load` and `--init_from` accept.

        It holds config.json (the run's resolved config), checkpoints/STEP with the parameters and
        the router state but no optimizer state, and the tokenizer: tokenizer.json, or
        tokenizer.model for SentencePiece.

        Args:
          directory: a folder that is empty or does not exist, local or gs://.

        Raises:
          UserError: the folder is not empty or cannot be written, or the tokenizer's file is
            missing.
        """
        tree = {
            "step": np.int32(self.step),
            "params": to_layers(self.params, self.model.layout),
            "router": self.router_state,
        }
        write_folder(directory, self.run_config, self.step, tree, self.tokenizer_name)

    def _checked(self, tokens_BT: TokenRows) -> Int[np.ndarray, "B T"]:
        try:
            tokens = np.asarray(tokens_BT)
        except ValueError:  # rows of different lengths
            raise UserError(
                "logits takes rows of equal length: pad them, or pass each row separately."
            ) from None
        if not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"logits takes token ids, which are integers, not {tokens.dtype}.")
        if tokens.ndim != 2 or not tokens.size:
            raise UserError(
                f"logits takes token ids of shape [B, T], not {list(tokens.shape)}: pass at least "
                f"one token, a single row as tokens[None]."
            )
        low, high, V = int(tokens.min()), int(tokens.max()), self.config.vocab_size
        if low < 0 or high >= V:
            raise UserError(
                f"logits got token id {low if low < 0 else high}, and this model has ids 0 to "
                f"{V - 1}: use LoadedModel.tokenizer."
            )
        return tokens.astype(np.int32)

    @functools.cached_property
    def _jitted_logits(self) -> Callable[[Params, dict[str, jax.Array], jax.Array], jax.Array]:
        config, mesh = self.config, self.mesh
        # "auto" selects these two wherever they are available; this device may not have them.
        if config.attention in ("cudnn", "splash"):
            config = dataclasses.replace(config, attention="auto")
        model = never_dropping(define(config, self.model.dtype, self.model.components))

        def logits(params, router_state, tokens_BT):
            B, T = tokens_BT.shape
            positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
            ones_BT = jnp.ones((B, T), jnp.int32)
            context = MoEContext(
                token_ids_BT=tokens_BT,
                mask_BT=ones_BT > 0,
                row_keys_B=jax.random.split(jax.random.key(0), B),
                mesh=mesh,
                group_rows=1,
                train=False,
                router_state=router_state,
            )
            x_BTD, _ = forward(model, params, tokens_BT, positions_BT, ones_BT, context)
            # The same matmul as in the loss (ops/cross_entropy.py).
            head_DV = head_weight(model, params).astype(x_BTD.dtype)
            wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
            return jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=wide)

        return jax.jit(logits, out_shardings=sharding(mesh, ("batch", None, None)))
