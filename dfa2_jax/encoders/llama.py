"""Llama 3 as a text encoder (HunyuanVideo's first). Names follow transformers' `LlamaModel`.

Attention is causal and there is no mask of padding: prompts are padded on the right, so no token of a prompt sees
padding. States at padding differ from transformers', and are not to be read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.io.errors import check_fields
from dfa2_jax.nn.config import config_from_json
from dfa2_jax.nn.linear import Linear
from dfa2_jax.nn.norms import RMSNorm
from dfa2_jax.nn.scan import run_blocks, stack
from dfa2_jax.nn.text import biased_attention, embedding
from dfa2_jax.nn.weights import merge_heads, split_heads
from dfa2_jax.weights.rules import Place

NOT_IMPLEMENTED = {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "hidden_act": "silu"}
"""Fields of a config.json that may have this value alone."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """transformers' fields, with transformers' defaults where a config.json may leave them out."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as there are heads
    head_dim: int | None = None  # None: the heads share hidden_size
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self):
        check_fields(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"Llama config: {self.hidden_size=} must be a multiple of {self.num_attention_heads=}")
        if self.key_heads < 1 or self.num_attention_heads % self.key_heads:
            raise ValueError(f"Llama config: {self.num_key_value_heads=} must divide {self.num_attention_heads=}")
        if self.size < 2 or self.size % 2:
            raise ValueError(f"Llama config: a head's size {self.size} must be even: its halves are rotated")
        if not self.rope_theta > 0:
            raise ValueError(f"Llama config: {self.rope_theta=} must be more than 0")

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "LlamaConfig":
        """From transformers' parsed config.json.

        Raises ValueError for what this model cannot be.
        """
        for name, only in NOT_IMPLEMENTED.items():
            if (value := json.get(name, only)) != only:
                raise ValueError(f"Llama config: {name}={value!r:.100}, but only {only!r} is implemented")
        return config_from_json(cls, {**json, "rope_theta": rope_theta(json)})

    @property
    def key_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def size(self) -> int:
        """Values of a head, of queries and keys alike."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim


def rope_theta(json: Mapping[str, Any]) -> Any:
    """The base of rotary positions, where transformers 5 writes it, or 4.

    Raises:
        ValueError: positions are scaled.
    """
    name = "rope_scaling" if json.get("rope_scaling") else "rope_parameters"
    rope = json.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"Llama config: {name}={rope!r:.100} is not an object")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(f"Llama config: {name} has rope_type={kind!r:.100}, but only 'default' is implemented")
    return rope.get("rope_theta", json.get("rope_theta", LlamaConfig.rope_theta))


def rotary_angles(num_tokens: int, size: int, theta: float) -> Float[np.ndarray, "T half"]:
    """Radians by which each pair of a head's values is rotated, computed on the host in float32 as torch does."""
    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequency = np.float32(1) / np.power(np.float32(theta), exponent)
    return np.arange(num_tokens, dtype=np.float32)[:, None] * frequency


def rotate_halves(
    x: Float[Array, "B T N H"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "B T N H"]:
    """Rotary positions (arXiv 2104.09864) of pairs `x[i]`, `x[i + H/2]`, in the dtype of x as transformers does."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (table.astype(x.dtype)[None, :, None] for table in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def silu(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """`x sigmoid(x)`, in float32 and rounded once as torch's kernel does."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


class LlamaAttention(nnx.Module):
    """Each key and value head serves a group of query heads (arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, size = config.hidden_size, config.size
        inner, shared = config.num_attention_heads * size, config.key_heads * size
        self.q_proj = Linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.k_proj, self.v_proj = (Linear(width, shared, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(2))
        self.o_proj = Linear(inner, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.num_heads, self.key_heads = config.num_attention_heads, config.key_heads

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Float[Array, "1 T T"],
        cos: Float[Array, "T half"],
        sin: Float[Array, "T half"],
    ) -> Float[Array, "B T D"]:
        q = rotate_halves(split_heads(self.q_proj(x), self.num_heads), cos, sin)
        k = rotate_halves(split_heads(self.k_proj(x), self.key_heads), cos, sin)
        v = split_heads(self.v_proj(x), self.key_heads)
        k, v = (jnp.repeat(y, self.num_heads // self.key_heads, axis=2) for y in (k, v))
        return self.o_proj(merge_heads(biased_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)))


class LlamaMLP(nnx.Module):
    """`down(silu(gate) * up)`."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (Linear(width, hidden, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(2))
        self.down_proj = Linear(hidden, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nnx.Module):
    """Attention, then the gated MLP, each behind an RMS norm."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps=eps, dtype=dtype)
        self.self_attn = LlamaAttention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(width, eps=eps, dtype=dtype)
        self.mlp = LlamaMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], *position: Float[Array, "..."]) -> Float[Array, "B T D"]:
        """position: the causal mask, cosines and sines of rotary positions."""
        x = x + self.self_attn(self.input_layernorm(x), *position)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaEncoder(nnx.Module):
    """The first layers of a Llama: neither the last `left_out` nor the final norm are made."""

    def __init__(self, config: LlamaConfig, *, left_out: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = stack(
            num_layers(config, left_out), lambda layer_rngs: LlamaLayer(config, dtype=dtype, rngs=layer_rngs), rngs
        )
        self.config = config

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """transformers' `hidden_states[-(left_out + 1)]`, where a token is no padding."""
        num_tokens = ids.shape[1]
        causal = jnp.tril(jnp.ones((1, num_tokens, num_tokens), bool))
        mask = jnp.where(causal, 0.0, -jnp.inf).astype(jnp.float32)
        angles = rotary_angles(num_tokens, self.config.size, self.config.rope_theta)
        position = mask, jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
        return run_blocks(self.layers, lambda layer, x, _: layer(x, *position), self.embed_tokens[...][ids])


def num_layers(config: LlamaConfig, left_out: int) -> int:
    """Layers that are made.

    Raises:
        ValueError: none is left.
    """
    if config.num_hidden_layers <= left_out:
        raise ValueError(f"Llama config: {config.num_hidden_layers=} must be more than {left_out=}, which no one reads")
    return config.num_hidden_layers - left_out


def place_of(config: LlamaConfig, *, left_out: int) -> Place:
    """The place of each layer of a checkpoint; the last `left_out` have none, and are not read."""

    def place(path: str, block: int) -> tuple[str, int] | None:
        if block >= config.num_hidden_layers:
            raise ValueError(f"layer {block} of {config.num_hidden_layers=}")
        return (path, block) if block < num_layers(config, left_out) else None

    return place
