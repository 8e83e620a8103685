"""FLUX.1 dev and schnell: double-stream then single-stream blocks over [text, visual], rotary positions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dfa2_jax.families.flux.config import FluxConfig
from dfa2_jax.nn.attention import Attend, BlockAttention, Dense, dense_plans
from dfa2_jax.nn.blocks import JointBlock, SingleBlock
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.linear import MLP, Linear
from dfa2_jax.nn.norms import AdaLNOut
from dfa2_jax.nn.scan import run_segment, stack
from dfa2_jax.nn.streams import Context
from pallas_kernels.layout import Layout


@carrier
class FluxConditions:
    """What the transformer is told beside latents and time.

    text: T5's states; pooled: CLIP's pooled state.
    cos, sin: `families.flux.positions.rope_table` for the text and the image's patches.
    guidance: `sampling.sinusoid` of 1000 guidance; FLUX.1-dev only.
    reference: tokens of a picture that the transformer sees beside the image; FLUX.1-Kontext only.
    """

    text: Float[Array | np.ndarray, "B T E"]
    pooled: Float[Array | np.ndarray, "B P"]
    cos: Float[Array | np.ndarray, "S half"]
    sin: Float[Array | np.ndarray, "S half"]
    guidance: Float[Array | np.ndarray, "1 256"] | None = None
    reference: Float[Array | np.ndarray, "B R C"] | None = None

    def last(self, count: int) -> "FluxConditions":
        """Those of the last `count` rows of the batch."""
        reference = None if self.reference is None else self.reference[-count:]
        return FluxConditions(self.text[-count:], self.pooled[-count:], self.cos, self.sin, self.guidance, reference)

    def share(self, rows: Callable[[Any], Any], tokens: Callable[[Any, int], Any]) -> "FluxConditions":
        """As in `families.base.Conditions`."""
        num_text = self.text.shape[1]

        def of_both(table: Any) -> Array:
            return jnp.concatenate([tokens(table[:num_text], 0), tokens(table[num_text:], 0)])

        text, pooled = tokens(rows(self.text), 1), rows(self.pooled)
        reference = None if self.reference is None else rows(self.reference)
        return FluxConditions(text, pooled, of_both(self.cos), of_both(self.sin), self.guidance, reference)


def clip_float16(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Residuals outgrow float16 in some FLUX prompts; diffusers clips them at its largest finite value."""
    return jnp.clip(x, -65504, 65504) if x.dtype == jnp.float16 else x


class FluxTransformer(nnx.Module):
    """Predicts the velocity of every visual token."""

    def __init__(self, config: FluxConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        to: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width, heads = config.width, config.num_attention_heads
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.x_embedder = Linear(config.in_channels, width, **to)
        self.context_embedder = Linear(config.joint_attention_dim, width, **to)
        self.timestep_embedder = MLP(256, width, width, activation=jax.nn.silu, **to)
        self.guidance_embedder = (
            MLP(256, width, width, activation=jax.nn.silu, **to) if config.guidance_embeds else None
        )
        self.text_embedder = MLP(config.pooled_projection_dim, width, width, activation=jax.nn.silu, **to)
        self.transformer_blocks = stack(
            config.num_layers, lambda r: JointBlock(width, heads, qk_norm=True, dtype=dtype, rngs=r), rngs
        )
        self.single_transformer_blocks = stack(
            config.num_single_layers, lambda r: SingleBlock(width, heads, dtype=dtype, rngs=r), rngs
        )
        self.norm_out = AdaLNOut(width, **to)
        self.proj_out = Linear(width, config.token_channels, **to)

    def __call__(
        self,
        tokens: Float[Array | np.ndarray, "B V in_channels"],
        timestep: Float[Array | np.ndarray, "#B 256"],
        conditions: FluxConditions,
        attend: Attend | None = None,
        *,
        memory: dict[str, Any] | None = None,
        plans: dict[str, Any] | None = None,
        skipped_blocks: Bool[Array, " blocks"] | None = None,
        unroll: int | bool = 1,
    ) -> tuple[Float[Array, "B V out_channels"], dict[str, Any]]:
        """Velocity of packed latents, and what attention remembers (`families.base.Transformer`).

        Args:
            tokens: latents in patches of (channel, row, column), `sampling.tokens.patchify`; FLUX.1-Fill's hold picture
                and mask, too.
            timestep: `sampling.sinusoid` of 1000 sigma.
            skipped_blocks: blocks to leave out, double-stream ones first.
        """
        num_visual, num_reference, seen = tokens.shape[1], 0, jnp.asarray(tokens)
        if conditions.reference is not None:
            num_reference = conditions.reference.shape[1]
            seen = jnp.concatenate([jnp.asarray(conditions.reference, seen.dtype), seen], axis=1)
        layout = Layout(conditions.text.shape[1] + num_reference, num_visual, text_first=True)
        visual = self.x_embedder(seen.astype(self.dtype))
        text = self.context_embedder(jnp.asarray(conditions.text))
        rope = jnp.asarray(conditions.cos), jnp.asarray(conditions.sin)
        context = Context(self.vector(timestep, conditions), layout, rope, num_reference)

        def double(block: JointBlock, streams: tuple[Array, Array], attention: BlockAttention) -> tuple[Array, Array]:
            visual, text = block(*streams, context, attention)
            return visual, clip_float16(text)

        def single(block: SingleBlock, x: Array, attention: BlockAttention) -> Array:
            return clip_float16(block(x, context, attention))

        attend = Dense() if attend is None else attend
        kept, plans, doubles = memory or {}, plans or dense_plans(self.config.calls(1, 1)), self.config.num_layers
        skip, skip_single = (None, None) if skipped_blocks is None else jnp.split(skipped_blocks, [doubles])
        where = "transformer_blocks", self.transformer_blocks, double, (visual, text), attend, kept, plans
        (visual, text), kept = run_segment(*where, skipped=skip, unroll=unroll)
        joined = jnp.concatenate([text, visual], axis=1)
        where = "single_transformer_blocks", self.single_transformer_blocks, single, joined, attend, kept, plans
        x, kept = run_segment(*where, skipped=skip_single, unroll=unroll)
        return self.proj_out(self.norm_out(x[:, layout.visual], context.vector)), kept

    def vector(self, timestep: Float[Array | np.ndarray, "#B 256"], conditions: FluxConditions) -> Float[Array, "B D"]:
        """What modulates every block: time, pooled text, and the guidance that FLUX.1-dev embeds."""
        time = self.timestep_embedder(jnp.asarray(timestep).astype(self.dtype))
        vector = time + self.text_embedder(jnp.asarray(conditions.pooled))
        if self.guidance_embedder is None:
            return vector
        if conditions.guidance is None:
            raise ValueError("This FLUX model embeds its guidance (guidance_embeds): guidance must not be None.")
        return vector + self.guidance_embedder(jnp.asarray(conditions.guidance).astype(self.dtype))
