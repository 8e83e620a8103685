"""T5 v1.1 encoder (SD3's third and FLUX.1's second text encoder). Names follow transformers' `T5EncoderModel`.

No attention mask: the diffusers pipelines pass none, and padding is attended. float16 overflows in the MLP of the XXL
checkpoint: use bfloat16 or float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.io.errors import check_fields
from dfa2_jax.nn.config import config_from_json
from dfa2_jax.nn.linear import Linear, gelu_tanh
from dfa2_jax.nn.norms import RMSNorm
from dfa2_jax.nn.scan import run_blocks, stack
from dfa2_jax.nn.text import biased_attention, embedding
from dfa2_jax.nn.weights import merge_heads, split_heads


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """transformers' fields, with transformers' defaults where a config.json may leave them out."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    def __post_init__(self):
        check_fields(self)
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(
                f"T5 config: feed_forward_proj={self.feed_forward_proj!r}, but only 'gated-gelu' (T5 v1.1) is "
                "implemented: use the encoder of SD3 or FLUX.1"
            )

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "T5Config":
        """From transformers' parsed config.json. Raises ValueError for what this model cannot be."""
        return config_from_json(cls, json)


def relative_position_buckets(
    distances: Int[np.ndarray, " n"], *, num_buckets: int, max_distance: int
) -> Int[np.ndarray, " n"]:
    """Bucket of each key-minus-query distance: exact when near, logarithmic when far (arXiv 1910.10683, section 2.1).

    Computed on the host in float32, as torch does: at powers of two the logarithm falls on a bucket's edge.
    """
    half = num_buckets // 2
    exact = half // 2
    near = np.abs(distances)
    ratio = np.log(np.maximum(near, exact).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int64)
    return (distances > 0) * half + np.where(near < exact, near, np.minimum(far, half - 1))


class T5Attention(nnx.Module):
    """Self-attention with no 1/sqrt(head_dim), which T5 folds into its initialisation."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.q, self.k, self.v = (Linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(3))
        self.o = Linear(inner, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(self, x: Float[Array, "B T D"], bias: Float[Array, "N T T"]) -> Float[Array, "B T D"]:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        return self.o(merge_heads(biased_attention(q, k, v, bias, scale=1.0)))


class T5Layer(nnx.Module):
    """Attention, then the gated MLP, each behind an RMS norm."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, hidden, eps = config.d_model, config.d_ff, config.layer_norm_epsilon
        self.attention_norm = RMSNorm(width, eps=eps, dtype=dtype)
        self.attention = T5Attention(config, dtype=dtype, rngs=rngs)
        self.ff_norm = RMSNorm(width, eps=eps, dtype=dtype)
        self.wi_0, self.wi_1 = (Linear(width, hidden, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(2))
        self.wo = Linear(hidden, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], bias: Float[Array, "N T T"]) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), bias)
        y = self.ff_norm(x)
        return x + self.wo(gelu_tanh(self.wi_0(y)) * self.wi_1(y))


class T5Encoder(nnx.Module):
    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.shared = embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        self.relative_attention_bias = embedding(
            config.relative_attention_num_buckets, config.num_heads, dtype=dtype, rngs=rngs
        )
        self.layers = stack(config.num_layers, lambda layer_rngs: T5Layer(config, dtype=dtype, rngs=layer_rngs), rngs)
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)
        self.config = config

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The last hidden state, after the final norm."""
        bias = self.position_bias(ids.shape[1])
        x = run_blocks(self.layers, lambda layer, x, _: layer(x, bias), self.shared[...][ids])
        return self.final_layer_norm(x)

    def position_bias(self, num_tokens: int) -> Float[Array, "N T T"]:
        """Added to every layer's scores; transformers stores the table in block 0 and hands its bias on."""
        buckets = relative_position_buckets(
            np.arange(1 - num_tokens, num_tokens),
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        by_distance = self.relative_attention_bias[...].astype(jnp.float32)[buckets]
        position = jnp.arange(num_tokens)
        return by_distance[position[None, :] - position[:, None] + num_tokens - 1].transpose(2, 0, 1)
