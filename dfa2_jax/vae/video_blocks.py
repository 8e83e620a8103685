"""Blocks of CogVideoX's autoencoder, in diffusers' arrangement and NFHWC (frames before pixels).

`F h w` are the frames and pixels of the level at hand; `f i j` are those of the latents `z`. Every norm of the decoder
reads them; the encoder has none, and its `z` is None. A video goes through in chunks of frames, and each convolution in
time carries frames to the next chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.vae.blocks import GroupNorm, conv
from dfa2_jax.vae.causal import FrameConv, PixelConv, after_first, chunk_norm, repeat_pixels


class ResnetCache(NamedTuple):
    """What the convolutions of a resnet block carry to the next chunk."""

    conv1: Float[Array, "B 2 h w C"]
    conv2: Float[Array, "B 2 h w E"]


class ChunkCache(NamedTuple):
    """What all convolutions carry to the next chunk: the last two frames of each one's input.

    blocks: by block in order of execution, then by resnet block.
    """

    conv_in: Float[Array, "B 2 h w C"]
    blocks: tuple[tuple[ResnetCache, ...], ...]
    conv_out: Float[Array, "B 2 y x E"]


class CausalConv(FrameConv):
    """A convolution over frames, with zeros around each, that goes on where the last chunk ended."""

    def __call__(
        self, x: Float[Array, "B F h w C"], before: Float[Array, "B 2 h w C"] | None
    ) -> tuple[Float[Array, "B F h w E"], Float[Array, "B 2 h w C"]]:
        """The convolution, and the two frames that the next chunk begins with.

        Args:
            before: what the last chunk's call returned; None: there was none, and the first frame stands twice before
                x.
        """
        x = after_first(x) if before is None else jnp.concatenate([before, x], axis=1)
        return self.convolve(x), x[:, -2:]


def repeat_frames(x: Float[Array, "B F h w C"], times: int = 2) -> Float[Array, "B G h w C"]:
    """Each frame `times` times; of an odd number of frames the first stays single, as it does where it is alone."""
    if x.shape[1] % 2 == 0:
        return jnp.repeat(x, times, axis=1)
    return jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], times, axis=1)], axis=1)


def halve_frames(x: Float[Array, "B F h w C"]) -> Float[Array, "B G h w C"]:
    """The mean of each two frames, in float32; of an odd number of frames the first stays as it is."""
    batch, frames, *rest = x.shape
    first, others = x[:, : frames % 2], x[:, frames % 2 :]
    means = others.reshape(batch, frames // 2, 2, *rest).astype(jnp.float32).mean(2).astype(x.dtype)
    return jnp.concatenate([first, means], axis=1)


class SpatialNorm(nnx.Module):
    """A group norm whose scale and shift come from the latents, pixel by pixel (arXiv 2209.09002).

    All is float32 and rounded once. Upsampling repeats latents, and the convolutions are of single pixels, so they come
    first: at the last level of the published model that is 1/256 of the products.
    """

    def __init__(self, channels: int, latent_channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm_layer = GroupNorm(channels, num_groups, dtype=dtype)
        self.conv_y, self.conv_b = (PixelConv(latent_channels, channels, dtype=dtype, rngs=rngs) for _ in range(2))

    def __call__(self, x: Float[Array, "B F h w C"], z: Float[Array, "B f i j L"]) -> Float[Array, "B F h w C"]:
        scale, shift = (self.at_pixels(conv(z), x).astype(jnp.float32) for conv in (self.conv_y, self.conv_b))
        return (chunk_norm(self.norm_layer, x.astype(jnp.float32)) * scale + shift).astype(x.dtype)

    def at_pixels(self, y: Float[Array, "B f i j C"], x: Float[Array, "B F h w C"]) -> Float[Array, "B F h w C"]:
        """y, as large as x."""
        odd = y.shape[1] % 2
        times = (x.shape[1] - odd) // (y.shape[1] - odd) if y.shape[1] > 1 else 1
        return repeat_frames(repeat_pixels(y, x.shape[2] // y.shape[2]), times)


Norm = SpatialNorm | GroupNorm


def make_norm(channels: int, latent_channels: int | None, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Norm:
    """The decoder's, or the encoder's where there are no latent channels."""
    if latent_channels is None:
        return GroupNorm(channels, num_groups, dtype=dtype)
    return SpatialNorm(channels, latent_channels, num_groups, dtype=dtype, rngs=rngs)


def activated(
    norm: Norm, x: Float[Array, "B F h w C"], z: Float[Array, "B f i j L"] | None
) -> Float[Array, "B F h w C"]:
    """What every convolution in time reads but the first."""
    if isinstance(norm, GroupNorm):
        return jax.nn.silu(chunk_norm(norm, x))
    assert z is not None, "the decoder's norms read latents"
    return jax.nn.silu(norm(x, z))


class ResnetBlock(nnx.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        latent_channels: int | None,
        num_groups: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = make_norm(in_channels, latent_channels, num_groups, dtype=dtype, rngs=rngs)
        self.conv1 = CausalConv(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = make_norm(out_channels, latent_channels, num_groups, dtype=dtype, rngs=rngs)
        self.conv2 = CausalConv(out_channels, out_channels, dtype=dtype, rngs=rngs)
        widens = in_channels != out_channels
        self.conv_shortcut = PixelConv(in_channels, out_channels, dtype=dtype, rngs=rngs) if widens else None

    def __call__(
        self, x: Float[Array, "B F h w C"], z: Float[Array, "B f i j L"] | None, cache: ResnetCache | None
    ) -> tuple[Float[Array, "B F h w E"], ResnetCache]:
        before1, before2 = (None, None) if cache is None else cache
        y, after1 = self.conv1(activated(self.norm1, x, z), before1)
        y, after2 = self.conv2(activated(self.norm2, y, z), before2)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return x + y, ResnetCache(after1, after2)


class Resnets(nnx.Module):
    """A chain of resnet blocks, the first of which changes the width: the middle block, and a part of the others."""

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        latent_channels: int | None,
        num_groups: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            ResnetBlock(
                out_channels if index else in_channels,
                out_channels,
                latent_channels,
                num_groups,
                dtype=dtype,
                rngs=rngs,
            )
            for index in range(count)
        )

    def __call__(
        self, x: Float[Array, "B F h w C"], z: Float[Array, "B f i j L"] | None, caches: Sequence[ResnetCache] | None
    ) -> tuple[Float[Array, "B G y x E"], tuple[ResnetCache, ...]]:
        afters = []
        for resnet, cache in zip(self.resnets, caches or [None] * len(self.resnets), strict=True):
            x, after = resnet(x, z, cache)
            afters.append(after)
        return x, tuple(afters)


class UpBlock(Resnets):
    """Resnet blocks, then doubling of pixels, with a convolution of each frame, and of frames.

    Args:
        upsample: whether pixels double.
        upsample_frames: whether frames do, where pixels do.
    """

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        num_groups: int,
        *,
        upsample: bool,
        upsample_frames: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(count, in_channels, out_channels, latent_channels, num_groups, dtype=dtype, rngs=rngs)
        self.upsampler = conv(out_channels, out_channels, 3, dtype=dtype, rngs=rngs) if upsample else None
        self.upsample_frames = upsample_frames

    def __call__(
        self, x: Float[Array, "B F h w C"], z: Float[Array, "B f i j L"] | None, caches: Sequence[ResnetCache] | None
    ) -> tuple[Float[Array, "B G y x E"], tuple[ResnetCache, ...]]:
        x, afters = super().__call__(x, z, caches)
        if self.upsampler is not None:
            # The convolution is of each frame alone, so it comes before the frames double: half of the products.
            x = self.upsampler(repeat_pixels(x))
            x = repeat_frames(x) if self.upsample_frames else x
        return x, afters


class DownBlock(Resnets):
    """Resnet blocks of the encoder, then halving of frames and of pixels, the latter by a convolution of each frame.

    Args:
        downsample: whether pixels are halved.
        downsample_frames: whether frames are, where pixels are.
    """

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        num_groups: int,
        *,
        downsample: bool,
        downsample_frames: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(count, in_channels, out_channels, None, num_groups, dtype=dtype, rngs=rngs)
        # diffusers pads one row below and one column right, and none above and left.
        self.downsampler = (
            conv(out_channels, out_channels, 3, stride=2, padding=(0, 1), dtype=dtype, rngs=rngs)
            if downsample
            else None
        )
        self.downsample_frames = downsample_frames

    def __call__(
        self, x: Float[Array, "B F h w C"], z: None, caches: Sequence[ResnetCache] | None
    ) -> tuple[Float[Array, "B G y x E"], tuple[ResnetCache, ...]]:
        x, afters = super().__call__(x, z, caches)
        if self.downsampler is not None:
            x = self.downsampler(halve_frames(x) if self.downsample_frames else x)
        return x, afters
