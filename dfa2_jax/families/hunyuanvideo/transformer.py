"""HunyuanVideo (arXiv 2412.03603): FLUX's blocks over [visual, text], text refined before them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dfa2_jax.families.hunyuanvideo.config import HunyuanVideoConfig
from dfa2_jax.families.hunyuanvideo.refiner import TokenRefiner
from dfa2_jax.nn.attention import Attend, BlockAttention, Dense, dense_plans
from dfa2_jax.nn.blocks import JointBlock, SingleBlock
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.linear import MLP, Linear
from dfa2_jax.nn.norms import AdaLNOut
from dfa2_jax.nn.scan import run_segment, stack
from dfa2_jax.nn.streams import Context
from pallas_kernels.layout import Layout


@carrier
class HunyuanVideoConditions:
    """What the transformer is told beside latents and time.

    text: Llama's states; pooled: CLIP's pooled state.
    cos, sin: `families.hunyuanvideo.positions.rope_table`.
    guidance: `sampling.sinusoid` of 1000 guidance, where the model embeds it.
    text_length: tokens of each text that are no padding, at least 1; None: all.
    own_text: positions of the text tokens that this device attends, of all, which it refines; None: all.
    """

    text: Float[Array | np.ndarray, "B T E"]
    pooled: Float[Array | np.ndarray, "B P"]
    cos: Float[Array | np.ndarray, "S half"]
    sin: Float[Array | np.ndarray, "S half"]
    guidance: Float[Array | np.ndarray, "1 256"] | None = None
    text_length: Int[Array | np.ndarray, " B"] | None = None
    own_text: Int[Array, " own"] | None = None

    def last(self, count: int) -> "HunyuanVideoConditions":
        """Those of the last `count` rows of the batch."""
        lengths = None if self.text_length is None else self.text_length[-count:]
        tables = self.cos, self.sin, self.guidance, lengths, self.own_text
        return HunyuanVideoConditions(self.text[-count:], self.pooled[-count:], *tables)

    def share(self, rows: Callable[[Any], Any], tokens: Callable[[Any, int], Any]) -> "HunyuanVideoConditions":
        """As in `families.base.Conditions`. Every device refines all text, whose tokens see each other."""
        num_text = self.text.shape[1]
        num_visual = len(self.cos) - num_text

        def of_both(table: Any) -> Array:
            return jnp.concatenate([tokens(table[:num_visual], 0), tokens(table[num_visual:], 0)])

        lengths = None if self.text_length is None else rows(self.text_length)
        tables = of_both(self.cos), of_both(self.sin), self.guidance, lengths
        own_text = tokens(jnp.arange(num_text, dtype=jnp.int32), 0)
        return HunyuanVideoConditions(rows(self.text), rows(self.pooled), *tables, own_text)


class HunyuanVideoTransformer(nnx.Module):
    """Predicts the velocity of every visual token."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        to: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width, heads = config.width, config.num_attention_heads
        embedder: dict[str, Any] = {"activation": jax.nn.silu} | to
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.x_embedder = Linear(config.token_channels, width, **to)
        self.context_embedder = TokenRefiner(config, **to)
        self.timestep_embedder = MLP(256, width, width, **embedder)
        self.guidance_embedder = MLP(256, width, width, **embedder) if config.guidance_embeds else None
        self.text_embedder = MLP(config.pooled_projection_dim, width, width, **embedder)
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
        tokens: Float[Array | np.ndarray, "B V C"],
        timestep: Float[Array | np.ndarray, "#B 256"],
        conditions: HunyuanVideoConditions,
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
            timestep: `sampling.sinusoid` of 1000 sigma.
            skipped_blocks: blocks to leave out, double-stream ones first.
        """
        time = jnp.asarray(timestep).astype(self.dtype)
        lengths = None if conditions.text_length is None else jnp.asarray(conditions.text_length)
        text = self.context_embedder(jnp.asarray(conditions.text), time, lengths)
        if conditions.own_text is not None:
            text = text[:, conditions.own_text]
        visual = self.x_embedder(jnp.asarray(tokens).astype(self.dtype))
        layout = Layout(num_text=text.shape[1], num_visual=visual.shape[1], text_first=False)
        rope = jnp.asarray(conditions.cos), jnp.asarray(conditions.sin)
        context = Context(self.vector(time, conditions), layout, rope)

        def double(block: JointBlock, streams: tuple[Array, Array], attention: BlockAttention) -> tuple[Array, Array]:
            return block(*streams, context, attention)

        def single(block: SingleBlock, x: Array, attention: BlockAttention) -> Array:
            return block(x, context, attention)

        attend = Dense() if attend is None else attend
        kept, plans, doubles = memory or {}, plans or dense_plans(self.config.calls(1, 1)), self.config.num_layers
        skip, skip_single = (None, None) if skipped_blocks is None else jnp.split(skipped_blocks, [doubles])
        options: dict[str, Any] = {"text_length": lengths, "unroll": unroll}
        where = "transformer_blocks", self.transformer_blocks, double, (visual, text), attend, kept, plans
        streams, kept = run_segment(*where, skipped=skip, **options)
        joined = jnp.concatenate(streams, axis=1)
        where = "single_transformer_blocks", self.single_transformer_blocks, single, joined, attend, kept, plans
        x, kept = run_segment(*where, skipped=skip_single, **options)
        return self.proj_out(self.norm_out(x[:, layout.visual], context.vector)), kept

    def vector(self, time: Float[Array, "#B 256"], conditions: HunyuanVideoConditions) -> Float[Array, "B D"]:
        """What modulates every block: time, pooled text, and guidance where the model embeds it."""
        vector = self.timestep_embedder(time) + self.text_embedder(jnp.asarray(conditions.pooled))
        if self.guidance_embedder is None:
            return vector
        if conditions.guidance is None:
            raise ValueError("This model embeds its guidance (guidance_embeds): guidance must not be None.")
        return vector + self.guidance_embedder(jnp.asarray(conditions.guidance).astype(self.dtype))
