"""CLIP text encoders: CLIP-L (SD3, FLUX.1) and OpenCLIP bigG (SD3). Names follow transformers' `CLIPTextModel`.

Attention is causal and padding is attended, as in the diffusers pipelines, which pass no attention mask.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.io.errors import check_fields
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.config import config_from_json
from dfa2_jax.nn.linear import MLP, Linear, gelu_tanh
from dfa2_jax.nn.norms import LayerNorm
from dfa2_jax.nn.scan import run_blocks, stack
from dfa2_jax.nn.text import biased_attention, embedding
from dfa2_jax.nn.weights import merge_heads, split_heads


def quick_gelu(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """`x sigmoid(1.702 x)`, in float32 as torch's kernels are: bfloat16 inside costs 8 % more error over 12 prompts."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.nn.sigmoid(1.702 * x32)).astype(x.dtype)


def gelu_erf(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu_erf,
    "gelu_pytorch_tanh": gelu_tanh,
}

# transformers' config class once had 2 as its default. The published checkpoints keep it, although their tokenizers end
# a prompt with 49407. With 2, `pooled` is taken at the largest id (transformers PR 24773).
LEGACY_EOS_TOKEN_ID = 2

# A whole CLIPModel's config.json holds the text encoder's own in `text_config`, where transformers 4 left these out.
WHOLE_MODEL_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """transformers' fields, with transformers' defaults where a config.json may leave them out."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 49408
    projection_dim: int = 512
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        check_fields(self)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"CLIP config: hidden_act={self.hidden_act!r} is unknown; known are {sorted(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"CLIP config: {self.hidden_size=} must be a multiple of {self.num_attention_heads=}")

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "CLIPTextConfig":
        """From transformers' parsed config.json, also a whole CLIPModel's.

        Raises ValueError for what this model cannot be.
        """
        if isinstance(text := json.get("text_config"), Mapping):
            json = WHOLE_MODEL_DEFAULTS | dict(text)
        return config_from_json(cls, json)


@carrier
class CLIPTextOutput:
    """Text states.

    hidden: after `num_hidden_layers - 1 - skip` layers, without the final norm.
    last: after all layers and the final norm.
    pooled: `last` at the end-of-text token, projected where the model has a projection.
    """

    hidden: Float[Array, "B T D"]
    last: Float[Array, "B T D"]
    pooled: Float[Array, "B E"]


class CLIPAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4)
        )
        self.num_heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "B T D"], mask: Float[Array, "1 T T"]) -> Float[Array, "B T D"]:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(biased_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)))


class CLIPLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(width, eps=eps, dtype=dtype)
        self.self_attn = CLIPAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, eps=eps, dtype=dtype)
        activation = ACTIVATIONS[config.hidden_act]
        self.mlp = MLP(width, config.intermediate_size, activation=activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], mask: Float[Array, "1 T T"]) -> Float[Array, "B T D"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextModel(nnx.Module):
    """transformers' CLIPTextModelWithProjection (SD3) with `projection`, CLIPTextModel (FLUX) without."""

    def __init__(self, config: CLIPTextConfig, *, projection: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.hidden_size
        self.token_embedding = embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embedding = embedding(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        self.layers = stack(
            config.num_hidden_layers, lambda layer_rngs: CLIPLayer(config, dtype=dtype, rngs=layer_rngs), rngs
        )
        self.final_layer_norm = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)
        self.text_projection = (
            Linear(width, config.projection_dim, use_bias=False, dtype=dtype, rngs=rngs) if projection else None
        )
        self.config = config

    def __call__(self, ids: Int[Array, "B T"], skip: Int[Array, ""] | int = 0) -> CLIPTextOutput:
        """`skip` is diffusers' `clip_skip`, traced: `hidden` is transformers' `hidden_states[-(skip + 2)]`.

        The caller checks its range (`Loaded.encode_prompt`). Raises ValueError for more tokens than positions.
        """
        num_tokens, num_layers = ids.shape[1], self.config.num_hidden_layers
        if num_tokens > self.config.max_position_embeddings:
            raise ValueError(f"{num_tokens=} must be at most {self.config.max_position_embeddings=}")
        causal = jnp.tril(jnp.ones((1, num_tokens, num_tokens), bool))
        mask = jnp.where(causal, 0.0, -jnp.inf).astype(jnp.float32)

        def step(layer: CLIPLayer, carry: Any, index: Int[Array, ""]) -> Any:
            x, hidden = carry
            return layer(x, mask), jnp.where(index == num_layers - 1 - skip, x, hidden)

        x = self.token_embedding[...][ids] + self.position_embedding[...][None, :num_tokens]
        # The chosen state rides along: one [B, T, D] more, where emitting every state would take num_layers of them.
        x, hidden = run_blocks(self.layers, step, (x, x), jnp.arange(num_layers))
        last = self.final_layer_norm(x)
        pooled = last[jnp.arange(ids.shape[0]), self.end_of_text(ids)]
        return CLIPTextOutput(hidden, last, pooled if self.text_projection is None else self.text_projection(pooled))

    def end_of_text(self, ids: Int[Array, "B T"]) -> Int[Array, " B"]:
        """Where `pooled` is taken: the largest id under the legacy config, else the first `eos_token_id`."""
        if self.config.eos_token_id == LEGACY_EOS_TOKEN_ID:
            return jnp.argmax(ids, axis=-1)
        return jnp.argmax(ids == self.config.eos_token_id, axis=-1)
