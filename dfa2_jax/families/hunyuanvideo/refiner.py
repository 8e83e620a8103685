"""HunyuanVideo's token refiner: blocks over text alone, which know the time (arXiv 2412.03603, section 4.3)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.families.hunyuanvideo.config import HunyuanVideoConfig
from dfa2_jax.nn.attention import arrow_attention
from dfa2_jax.nn.linear import MLP, Linear
from dfa2_jax.nn.norms import LayerNorm
from dfa2_jax.nn.scan import run_blocks, stack
from dfa2_jax.nn.weights import merge_heads, split_heads
from pallas_kernels.layout import Layout


class RefinerBlock(nnx.Module):
    """Self-attention and an MLP, each with a gate."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, to = config.width, {"dtype": dtype, "rngs": rngs}
        self.num_heads = config.num_attention_heads
        self.norm1, self.norm2 = (LayerNorm(width, dtype=dtype) for _ in range(2))
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(width, width, **to) for _ in range(4))
        self.ff = MLP(width, 4 * width, activation=jax.nn.silu, **to)
        self.gates = Linear(width, 2 * width, **to)

    def __call__(
        self, x: Float[Array, "B T D"], vector: Float[Array, "B D"], text_length: Int[Array, " B"] | None
    ) -> Float[Array, "B T D"]:
        gate, gate_mlp = jnp.split(self.gates(jax.nn.silu(vector))[:, None], 2, axis=-1)
        normed = self.norm1(x)
        q, k, v = (split_heads(project(normed), self.num_heads) for project in (self.to_q, self.to_k, self.to_v))
        out = arrow_attention(q, k, v, layout=Layout(x.shape[1], 0, text_first=False), text_length=text_length)
        x = x + gate * self.to_out(merge_heads(out))
        return x + gate_mlp * self.ff(self.norm2(x))


class TokenRefiner(nnx.Module):
    """Text states as the transformer reads them, refined for one time."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, to = config.width, {"dtype": dtype, "rngs": rngs}
        embedder: dict[str, Any] = {"activation": jax.nn.silu} | to
        self.timestep_embedder = MLP(256, width, width, **embedder)
        self.text_embedder = MLP(config.text_embed_dim, width, width, **embedder)
        self.proj_in = Linear(config.text_embed_dim, width, **to)
        self.blocks = stack(config.num_refiner_layers, lambda r: RefinerBlock(config, dtype=dtype, rngs=r), rngs)

    def __call__(
        self,
        text: Float[Array, "B T E"],
        timestep: Float[Array, "#B 256"],
        text_length: Int[Array, " B"] | None,
    ) -> Float[Array, "B T D"]:
        """
        Args:
            text_length: of each sample, at least 1; None: there is no padding.
        """
        vector = self.timestep_embedder(timestep) + self.text_embedder(mean_text(text, text_length))
        return run_blocks(self.blocks, lambda block, x, _: block(x, vector, text_length), self.proj_in(text))


def mean_text(text: Float[Array, "B T E"], text_length: Int[Array, " B"] | None) -> Float[Array, "B E"]:
    """The mean over tokens that are no padding, in float32, rounded once."""
    if text_length is None:
        return text.astype(jnp.float32).mean(1).astype(text.dtype)
    exists = jnp.arange(text.shape[1])[None] < text_length[:, None]
    total = jnp.where(exists[:, :, None], text.astype(jnp.float32), 0).sum(1)
    return (total / text_length[:, None].astype(jnp.float32)).astype(text.dtype)
