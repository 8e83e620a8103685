"""CogVideoX (arXiv 2408.06072): equal blocks over [text, visual]; streams share all weights but the modulation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dfa2_jax.families.cogvideox.config import CogVideoXConfig
from dfa2_jax.nn.attention import Attend, BlockAttention, Dense, dense_plans
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.linear import MLP, Linear
from dfa2_jax.nn.norms import LayerNorm
from dfa2_jax.nn.scan import run_segment, stack
from dfa2_jax.nn.streams import Context, Projections
from pallas_kernels.layout import Layout


@carrier
class CogVideoXConditions:
    """What the transformer is told beside latents and time.

    text: T5's states, of padding too: no text is masked.
    table: `families.cogvideox.positions.position_table`, of a model without rotary positions.
    cos, sin: `positions.rope_table`, of a model with them.
    """

    text: Float[Array | np.ndarray, "B T E"]
    table: Float[Array | np.ndarray, "V D"] | None = None
    cos: Float[Array | np.ndarray, "S half"] | None = None
    sin: Float[Array | np.ndarray, "S half"] | None = None

    def last(self, count: int) -> "CogVideoXConditions":
        """Those of the last `count` rows of the batch."""
        return CogVideoXConditions(self.text[-count:], self.table, self.cos, self.sin)

    def share(self, rows: Callable[[Any], Any], tokens: Callable[[Any, int], Any]) -> "CogVideoXConditions":
        """As in `families.base.Conditions`."""
        num_text = self.text.shape[1]

        def of_both(rope: Any) -> Array | None:
            if rope is None:
                return None
            return jnp.concatenate([tokens(rope[:num_text], 0), tokens(rope[num_text:], 0)])

        table = None if self.table is None else tokens(self.table, 0)
        return CogVideoXConditions(tokens(rows(self.text), 1), table, of_both(self.cos), of_both(self.sin))


class JointNorm(nnx.Module):
    """One layer norm of both streams, and a modulation of each: shift, scale and gate, the visual ones first."""

    def __init__(self, config: CogVideoXConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = Linear(config.time_embed_dim, 6 * config.width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(config.width, eps=config.norm_eps, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B S D"], context: Context
    ) -> tuple[Float[Array, "B S D"], Float[Array, "_ S D"]]:
        """The modulated norm, and the gate."""
        chunks = jnp.split(self.linear(jax.nn.silu(context.vector))[:, None], 6, axis=-1)
        is_text = np.zeros((1, context.layout.length, 1), bool)
        is_text[:, context.layout.text] = True
        shift, scale, gate = (
            jnp.where(is_text, text, visual) for visual, text in zip(chunks[:3], chunks[3:], strict=True)
        )
        return self.norm(x) * (1 + scale) + shift, gate


class CogVideoXBlock(nnx.Module):
    """Attention, then an MLP, over the joint sequence. Queries and keys have layer norms by head, of epsilon 1e-6."""

    def __init__(self, config: CogVideoXConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, heads = config.width, config.num_attention_heads
        self.norm1 = JointNorm(config, dtype=dtype, rngs=rngs)
        self.attn = Projections(width, heads, qk_norm=True, norm=LayerNorm, dtype=dtype, rngs=rngs)
        self.norm2 = JointNorm(config, dtype=dtype, rngs=rngs)
        self.ff = MLP(width, 4 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"], context: Context, attention: BlockAttention) -> Float[Array, "B S D"]:
        normed, gate = self.norm1(x, context)

        out = attention("attn", lambda heads=None: context.sequence(self.attn.qkv(normed, heads)), context.layout)
        x = x + gate * self.attn.out(out)

        normed, gate = self.norm2(x, context)
        return x + gate * self.ff(normed)


class LastNorm(nnx.Module):
    """The last norm; its modulation is stored as (shift, scale), the reverse of `nn.norms.AdaLNOut`."""

    def __init__(self, config: CogVideoXConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = Linear(config.time_embed_dim, 2 * config.width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(config.width, eps=config.norm_eps, dtype=dtype)

    def __call__(self, x: Float[Array, "B V D"], vector: Float[Array, "#B E"]) -> Float[Array, "B V D"]:
        shift, scale = jnp.split(self.linear(jax.nn.silu(vector))[:, None], 2, axis=-1)
        return self.norm(x) * (1 + scale) + shift


class CogVideoXTransformer(nnx.Module):
    """Predicts the velocity (v-prediction, arXiv 2202.00512) of every visual token."""

    def __init__(self, config: CogVideoXConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        to: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width, time = config.width, config.time_embed_dim
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.patch_embed = Linear(config.token_channels, width, **to)
        self.text_proj = Linear(config.text_embed_dim, width, **to)
        self.time_embedding = MLP(width, time, time, activation=jax.nn.silu, **to)
        self.transformer_blocks = stack(config.num_layers, lambda r: CogVideoXBlock(config, dtype=dtype, rngs=r), rngs)
        self.norm_final = LayerNorm(width, eps=config.norm_eps, dtype=dtype)
        self.norm_out = LastNorm(config, **to)
        self.proj_out = Linear(width, config.token_channels, **to)

    def __call__(
        self,
        tokens: Float[Array | np.ndarray, "B V C"],
        timestep: Float[Array | np.ndarray, "#B D"],
        conditions: CogVideoXConditions,
        attend: Attend | None = None,
        *,
        memory: dict[str, Any] | None = None,
        plans: dict[str, Any] | None = None,
        skipped_blocks: Bool[Array, " blocks"] | None = None,
        unroll: int | bool = 1,
    ) -> tuple[Float[Array, "B V C"], dict[str, Any]]:
        """Velocity of packed latents, and what attention remembers (`families.base.Transformer`).

        Args:
            tokens: latents in patches of (channel, frame, row, column), `sampling.tokens.VideoPatches`.
            timestep: `sampling.sinusoid` of the scheduler's timestep, as wide as the model.
        """
        layout = Layout(num_text=conditions.text.shape[1], num_visual=tokens.shape[1], text_first=True)
        visual = self.patch_embed(jnp.asarray(tokens).astype(self.dtype))
        if conditions.table is not None:
            visual = visual + jnp.asarray(conditions.table).astype(self.dtype)[None]
        text = self.text_proj(jnp.asarray(conditions.text))
        is_rotary = conditions.cos is not None and conditions.sin is not None
        rope = (jnp.asarray(conditions.cos), jnp.asarray(conditions.sin)) if is_rotary else None
        vector = self.time_embedding(jnp.asarray(timestep).astype(self.dtype))
        context = Context(vector, layout, rope)

        def step(block: CogVideoXBlock, x: Array, attention: BlockAttention) -> Array:
            return block(x, context, attention)

        attend, plans = attend or Dense(), plans or dense_plans(self.config.calls(1, 1))
        joined = jnp.concatenate([text, visual], axis=1)
        where = "transformer_blocks", self.transformer_blocks, step, joined, attend, memory or {}, plans
        x, kept = run_segment(*where, skipped=skipped_blocks, unroll=unroll)
        return self.proj_out(self.norm_out(self.norm_final(x[:, layout.visual]), vector)), kept
