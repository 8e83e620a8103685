"""Blocks of HunyuanVideo's autoencoder, in diffusers' arrangement and NFHWC (frames before pixels).

`F h w` are the frames and pixels of the level at hand. Convolutions and attention look at earlier frames only; norms
see all.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.nn.linear import Linear
from dfa2_jax.vae.blocks import MAX_SCORES, GroupNorm, chunked_attention
from dfa2_jax.vae.causal import FrameConv, PixelConv, after_first, chunk_norm, repeat_pixels


class EdgeConv(FrameConv):
    """A convolution over frames; around them, and before the first, stand their outermost pixels and the first."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(in_channels, out_channels, around="edge", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B F h w C"]) -> Float[Array, "B F h w E"]:
        return self.convolve(after_first(x))


def activated(norm: GroupNorm, x: Float[Array, "B F h w C"]) -> Float[Array, "B F h w C"]:
    """What the convolutions read that follow a norm."""
    return jax.nn.silu(chunk_norm(norm, x))


class ResnetBlock(nnx.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_channels, num_groups, dtype=dtype)
        self.conv1 = EdgeConv(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, num_groups, dtype=dtype)
        self.conv2 = EdgeConv(out_channels, out_channels, dtype=dtype, rngs=rngs)
        widens = in_channels != out_channels
        self.conv_shortcut = PixelConv(in_channels, out_channels, dtype=dtype, rngs=rngs) if widens else None

    def __call__(self, x: Float[Array, "B F h w C"]) -> Float[Array, "B F h w E"]:
        y = self.conv1(activated(self.norm1, x))
        y = self.conv2(activated(self.norm2, y))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def frame_causal_attention(
    q: Float[Array, "B F P D"], k: Float[Array, "B F P D"], v: Float[Array, "B F P D"], *, max_scores: int = MAX_SCORES
) -> Float[Array, "B F P D"]:
    """One-head attention of each pixel to all pixels of its frame and of earlier ones.

    A frame's keys are all of those before it, so nothing is masked and no product is of pixels that are not seen. Of
    five frames that leaves 0.6 of the products. About `max_scores` scores are held at once (`chunked_attention`).
    """
    batch, frames, pixels, width = q.shape

    def until(x: Float[Array, "B F P D"], frame: int) -> Float[Array, "B S D"]:
        return x[:, : frame + 1].reshape(batch, (frame + 1) * pixels, width)

    seen = [
        chunked_attention(q[:, frame], until(k, frame), until(v, frame), max_scores=max_scores)
        for frame in range(frames)
    ]
    return jnp.stack(seen, axis=1)


class Attention(nnx.Module):
    """Frame-causal attention over pixels, with its residual."""

    def __init__(self, channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, num_groups, dtype=dtype)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Linear(channels, channels, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "B F h w C"]) -> Float[Array, "B F h w C"]:
        batch, frames, height, width, channels = x.shape
        pixels = chunk_norm(self.group_norm, x).reshape(batch, frames, height * width, channels)
        out = frame_causal_attention(self.to_q(pixels), self.to_k(pixels), self.to_v(pixels))
        return x + self.to_out(out).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resnets = nnx.List(ResnetBlock(channels, channels, num_groups, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attention = Attention(channels, num_groups, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B F h w C"]) -> Float[Array, "B F h w C"]:
        return self.resnets[1](self.attention(self.resnets[0](x)))


class UpBlock(nnx.Module):
    """Resnet blocks, then doubling of pixels, and of frames but the first, with a convolution over both.

    Args:
        upsample: whether pixels double.
        upsample_frames: whether frames do, where pixels do.
    """

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        num_groups: int,
        *,
        upsample: bool,
        upsample_frames: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            ResnetBlock(out_channels if index else in_channels, out_channels, num_groups, dtype=dtype, rngs=rngs)
            for index in range(count)
        )
        self.upsampler = EdgeConv(out_channels, out_channels, dtype=dtype, rngs=rngs) if upsample else None
        self.upsample_frames = upsample_frames

    def __call__(self, x: Float[Array, "B F h w C"]) -> Float[Array, "B G y x E"]:
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsampler is None:
            return x
        if self.upsample_frames:
            x = jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], 2, axis=1)], axis=1)
        return self.upsampler(repeat_pixels(x))
