"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): joint blocks over [visual, text]."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dfa2_jax.families.sd3.config import SD3Config, Segment
from dfa2_jax.nn.attention import Attend, BlockAttention, Dense, dense_plans
from dfa2_jax.nn.blocks import DualBlock, JointBlock
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.linear import MLP, Linear
from dfa2_jax.nn.norms import AdaLNOut
from dfa2_jax.nn.scan import run_segment, stack
from dfa2_jax.nn.streams import Context, ReadOnlyStream, Stream
from dfa2_jax.nn.weights import matmul_precision
from pallas_kernels.layout import Layout


@carrier
class SD3Conditions:
    """What the transformer is told beside latents and time.

    text: CLIP's and T5's states; pooled: both CLIPs' pooled states.
    positions: `families.sd3.positions.crop_positions` for the image's patches.
    """

    text: Float[Array | np.ndarray, "B T E"]
    pooled: Float[Array | np.ndarray, "B P"]
    positions: Float[Array | np.ndarray, "1 V D"]

    def last(self, count: int) -> "SD3Conditions":
        """Those of the last `count` rows of the batch."""
        return SD3Conditions(self.text[-count:], self.pooled[-count:], self.positions)

    def share(self, rows: Callable[[Any], Any], tokens: Callable[[Any, int], Any]) -> "SD3Conditions":
        """As in `families.base.Conditions`."""
        return SD3Conditions(tokens(rows(self.text), 1), rows(self.pooled), tokens(self.positions, 1))


class PositionTable(nnx.Variable):
    """The stored position embedding of every patch of the largest image: kept on the host, cropped per image size."""


class SD3Transformer(nnx.Module):
    """Predicts the velocity of every visual token."""

    def __init__(self, config: SD3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        to: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width = config.width
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.pos_embed = PositionTable(jnp.zeros((config.pos_embed_max_size**2, width), dtype))
        self.patch_embed = nnx.LinearGeneral(  # diffusers' convolution over whole patches, as a product
            config.patch_shape,
            width,
            axis=(-3, -2, -1),
            dtype=dtype,
            param_dtype=dtype,
            precision=matmul_precision(dtype),
            rngs=rngs,
        )
        self.timestep_embedder = MLP(256, width, width, activation=jax.nn.silu, **to)
        self.text_embedder = MLP(config.pooled_projection_dim, width, width, activation=jax.nn.silu, **to)
        self.context_embedder = Linear(config.joint_attention_dim, width, **to)

        def block(segment: Segment, rngs: nnx.Rngs) -> JointBlock:
            kind, text = DualBlock if segment.dual else JointBlock, ReadOnlyStream if segment.last else Stream
            heads, qk_norm = config.num_attention_heads, config.qk_norm is not None
            return kind(width, heads, qk_norm=qk_norm, text=text, dtype=dtype, rngs=rngs)

        self.segments = nnx.List([stack(segment.count, partial(block, segment), rngs) for segment in config.segments])
        self.norm_out = AdaLNOut(width, **to)
        self.proj_out = Linear(width, config.token_channels, **to)

    def __call__(
        self,
        tokens: Float[Array | np.ndarray, "B V C"],
        timestep: Float[Array | np.ndarray, "#B 256"],
        conditions: SD3Conditions,
        attend: Attend | None = None,
        *,
        memory: dict[str, Any] | None = None,
        plans: dict[str, Any] | None = None,
        skipped_blocks: Bool[Array, " blocks"] | None = None,
        unroll: int | bool = 1,
    ) -> tuple[Float[Array, "B V C"], dict[str, Any]]:
        """Velocity of patchified latents, and what attention remembers (`families.base.Transformer`).

        Args:
            tokens: latents in patches of (row, column, channel), `sampling.tokens.patchify`.
            timestep: `sampling.sinusoid` of 1000 sigma.
            skipped_blocks: blocks to leave out (skip-layer guidance); traced, so another choice compiles nothing.
        """
        config = self.config
        layout = Layout(num_text=conditions.text.shape[1], num_visual=tokens.shape[1], text_first=False)
        patches = jnp.asarray(tokens).astype(self.dtype).reshape(*tokens.shape[:-1], *config.patch_shape)
        visual = self.patch_embed(patches) + jnp.asarray(conditions.positions).astype(self.dtype)
        time = self.timestep_embedder(jnp.asarray(timestep).astype(self.dtype))
        context = Context(time + self.text_embedder(jnp.asarray(conditions.pooled)), layout)
        streams = visual, self.context_embedder(jnp.asarray(conditions.text))

        def step(block: JointBlock, streams: tuple[Array, Array], attention: BlockAttention) -> tuple[Array, Array]:
            return block(*streams, context, attention)

        attend, memory = Dense() if attend is None else attend, memory or {}
        plans, start = plans or dense_plans(self.config.calls(1, 1)), 0
        for number, (blocks, segment) in enumerate(zip(self.segments, config.segments, strict=True)):
            skipped = None if skipped_blocks is None else skipped_blocks[start : start + segment.count]
            where = f"segments.{number}", blocks, step, streams, attend, memory, plans
            streams, memory = run_segment(*where, skipped=skipped, unroll=unroll)
            start += segment.count
        return self.proj_out(self.norm_out(streams[0], context.vector)), memory
