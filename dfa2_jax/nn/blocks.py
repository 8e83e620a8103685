"""Transformer blocks: two streams with one attention, or one stream."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.nn.attention import BlockAttention
from dfa2_jax.nn.linear import MLP
from dfa2_jax.nn.norms import AdaLN
from dfa2_jax.nn.streams import Context, DualStream, Projections, Stream

Visual = Float[Array, "B V D"]
Text = Float[Array, "B T D"]


class JointBlock(nnx.Module):
    """MMDiT block (Stable Diffusion 3, arXiv 2403.03206, figure 2b): two streams, one attention.

    Args:
        text: `Stream`, or `ReadOnlyStream` in SD3's last block.
    """

    visual_stream: Callable[..., Any] = Stream

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool,
        text: Callable[..., Any] = Stream,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.visual = type(self).visual_stream(width, num_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.text = text(width, num_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)

    def __call__(self, visual: Visual, text: Text, context: Context, attention: BlockAttention) -> tuple[Visual, Text]:
        v, t = self.visual.modulated(visual, context), self.text.modulated(text, context)

        out = attention("attn", lambda heads=None: context.joined(v.qkv(heads), t.qkv(heads)), context.layout)
        visual, text = v.write(visual, out[:, context.visual]), t.write(text, out[:, context.text])

        return v.feed_forward(visual), t.feed_forward(text)


class DualBlock(JointBlock):
    """SD3.5's block: after the joint attention, one over visual tokens alone."""

    visual_stream = DualStream

    def __call__(self, visual: Visual, text: Text, context: Context, attention: BlockAttention) -> tuple[Visual, Text]:
        v, t = self.visual.modulated(visual, context), self.text.modulated(text, context)

        out = attention("attn", lambda heads=None: context.joined(v.qkv(heads), t.qkv(heads)), context.layout)
        visual, text = v.write(visual, out[:, context.visual]), t.write(text, out[:, context.text])

        out = attention("attn2", lambda heads=None: context.sequence(v.qkv2(heads)), context.visual_alone)
        visual = v.write2(visual, out)

        return v.feed_forward(visual), t.feed_forward(text)


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel from one norm, over the joint sequence (ViT-22B, arXiv 2302.05442, section 2)."""

    def __init__(self, width: int, num_heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = AdaLN(width, 1, dtype=dtype, rngs=rngs)
        self.attn = Projections(width, num_heads, qk_norm=True, dtype=dtype, rngs=rngs)
        self.ff = MLP(width, 4 * width, down_bias=False, dtype=dtype, rngs=rngs)  # to_out carries the common bias

    def __call__(self, x: Float[Array, "B S D"], context: Context, attention: BlockAttention) -> Float[Array, "B S D"]:
        (modulation,) = self.norm(context.vector)
        normed = self.attn.modulated(x, modulation)

        out = attention("attn", lambda heads=None: context.sequence(self.attn.qkv(normed, heads)), context.layout)

        return x + modulation.gate * (self.attn.out(out) + self.ff(normed))
