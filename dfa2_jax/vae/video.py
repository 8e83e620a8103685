"""AutoencoderKLCogVideoX: latents to videos and back.

Names follow diffusers' class of that name; arrays are NFHWC throughout.

A video goes through in chunks of frames, and the chunks are part of the model. Norms see the frames of their chunk, and
the convolutions carry two frames of it to the next chunk. Runs in its parameters' dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.io.errors import check_fields
from dfa2_jax.nn.config import config_from_json
from dfa2_jax.vae.chunks import Chunk
from dfa2_jax.vae.tiles import Axis, Tiles
from dfa2_jax.vae.video_blocks import (
    CausalConv,
    ChunkCache,
    DownBlock,
    Norm,
    Resnets,
    UpBlock,
    activated,
    make_norm,
)

# config.json fields with one value that is implemented: CogVideoX's, and diffusers' default. The quant convolutions of
# diffusers' class have another number of channels than its latents, so no model with them runs there.
IMPLEMENTED = {
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

OVERLAP = {"sample_height": 1 / 6, "sample_width": 1 / 5}
"""Shares of a tile that are blended."""

LATENT_CHUNK, VIDEO_CHUNK = 2, 8
"""Frames of a chunk after the first, of latents and of a video. The first chunk takes what is left over, too."""


@dataclass(frozen=True, kw_only=True)
class VideoAutoencoderConfig:
    """diffusers' fields, with diffusers' defaults where a config.json may leave them out.

    `invert_scale_latents` is ignored, as diffusers' text-to-video pipeline ignores it.
    """

    tiles_itself: ClassVar[bool] = False

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)  # from the video's end to the latents'
    layers_per_block: int = 3  # of the encoder; the decoder has one more
    latent_channels: int = 16
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    scaling_factor: float = 1.15258426
    sample_height: int = 480  # of videos that are not cut: tiles are half as large
    sample_width: int = 720

    def __post_init__(self):
        check_fields(self)
        levels, ratio = len(self.block_out_channels), self.temporal_compression_ratio
        if not 0 < levels < 10:
            raise ValueError(f"Video VAE config: {len(self.block_out_channels)=} must be from 1 to 9 levels")
        if ratio not in (powers := [2**level for level in range(levels)]):
            raise ValueError(f"Video VAE config: {self.temporal_compression_ratio=} must be one of {powers}")
        if self.scaling_factor <= 0:
            raise ValueError(f"Video VAE config: {self.scaling_factor=} must be positive: latents are divided by it")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"Video VAE config: {self.block_out_channels=} must be multiples of {self.norm_num_groups=}"
            )

    @property
    def scale(self) -> int:
        """Pixels along a side of one latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_levels(self) -> int:
        """Levels whose number of frames changes."""
        return self.temporal_compression_ratio.bit_length() - 1

    def num_frames(self, latent_frames: int) -> int:
        """Frames that latent frames are decoded to: 4F - 3 for an odd number F, but 4F for an even one."""
        ratio = self.temporal_compression_ratio
        return latent_frames * ratio - (ratio - 1 if latent_frames % 2 else 0)

    def chunks(self, latent_frames: int) -> list[Chunk]:
        """A first call of `decode_first`, and calls of `decode_next`, by `frame_chunks`."""
        first, *later = [(part, self.num_frames(part.stop - part.start)) for part in frame_chunks(latent_frames)]
        following = [Chunk(*part, "decode_next", gives_cache=True, takes_cache=True) for part in later]
        return [Chunk(*first, "decode_first", gives_cache=True), *following]

    def tiles(self) -> Tiles:
        """Half as high and wide as the videos that the autoencoder was made for.

        Raises:
            ValueError: they do not meet.
        """
        return Tiles(self._axis("sample_height"), self._axis("sample_width"), self.scale)

    def _axis(self, name: str) -> Axis:
        size = getattr(self, name)
        return Axis.meeting(size // 2, OVERLAP[name], self.scale, f"half of the VAE's {name}={size}")

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "VideoAutoencoderConfig":
        """From diffusers' parsed config.json. Raises ValueError for what this model cannot be."""
        for name, value in IMPLEMENTED.items():
            if json.get(name, value) != value:
                raise ValueError(f"Video VAE config: {name}={json[name]!r}, but only {value!r} is implemented")
        config = config_from_json(cls, json)
        for name, block in (("down_block_types", "CogVideoXDownBlock3D"), ("up_block_types", "CogVideoXUpBlock3D")):
            wanted = [block] * len(config.block_out_channels)
            if list(json.get(name, wanted)) != wanted:
                raise ValueError(f"Video VAE config: {name}={json[name]!r}, but only {wanted!r} is implemented")
        return config


def frame_chunks(latent_frames: int) -> list[slice]:
    """The latent frames of each call: up to 3 of `decode_first`, which takes what is odd, and 2 of each `decode_next`.

    Raises:
        ValueError: there is no frame.
    """
    return chunks(latent_frames, LATENT_CHUNK)


def video_chunks(frames: int) -> list[slice]:
    """The frames of each call: up to 15 of `encode_first`, which takes what is left over, and 8 of each `encode_next`.

    Raises:
        ValueError: there is no frame.
    """
    return chunks(frames, VIDEO_CHUNK)


def chunks(frames: int, size: int) -> list[slice]:
    if frames < 1:
        raise ValueError(f"A video needs frames, got {frames=}: ask for at least 1")
    first = min(frames, size + frames % size)
    return [slice(0, first), *(slice(start, start + size) for start in range(first, frames, size))]


class Coder(nnx.Module):
    """One direction, of one chunk. How a video is cut into chunks is the caller's part."""

    conv_in: CausalConv
    norm_out: Norm
    conv_out: CausalConv

    def chunk(
        self,
        blocks: Sequence[Resnets],
        x: Float[Array, "B F h w C"],
        z: Float[Array, "B f i j L"] | None,
        cache: ChunkCache | None,
    ) -> tuple[Float[Array, "B G y x E"], ChunkCache]:
        """The convolutions at both ends, and the blocks in order of execution between them."""
        before_in, befores, before_out = (None, [None] * len(blocks), None) if cache is None else cache
        x, after_in = self.conv_in(x, before_in)
        afters = []
        for block, before in zip(blocks, befores, strict=True):
            x, after = block(x, z, before)
            afters.append(after)
        x, after_out = self.conv_out(activated(self.norm_out, x, z), before_out)
        return x, ChunkCache(after_in, tuple(afters), after_out)


class Encoder(Coder):
    def __init__(self, config: VideoAutoencoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            DownBlock(
                config.layers_per_block,
                widths[max(level - 1, 0)],
                width,
                groups,
                downsample=level < len(widths) - 1,
                downsample_frames=level < config.temporal_levels,
                dtype=dtype,
                rngs=rngs,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = Resnets(2, widths[-1], widths[-1], None, groups, dtype=dtype, rngs=rngs)
        self.norm_out = make_norm(widths[-1], None, groups, dtype=dtype, rngs=rngs)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B F height width C"], cache: ChunkCache | None
    ) -> tuple[Float[Array, "B f h w E"], ChunkCache]:
        return self.chunk([*self.down_blocks, self.mid_block], x, None, cache)


class Decoder(Coder):
    def __init__(self, config: VideoAutoencoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups, latents = config.block_out_channels[::-1], config.norm_num_groups, config.latent_channels
        self.conv_in = CausalConv(latents, widths[0], dtype=dtype, rngs=rngs)
        self.mid_block = Resnets(2, widths[0], widths[0], latents, groups, dtype=dtype, rngs=rngs)
        self.up_blocks = nnx.List(
            UpBlock(
                config.layers_per_block + 1,
                widths[max(level - 1, 0)],
                width,
                latents,
                groups,
                upsample=level < len(widths) - 1,
                upsample_frames=level < config.temporal_levels,
                dtype=dtype,
                rngs=rngs,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = make_norm(widths[-1], latents, groups, dtype=dtype, rngs=rngs)
        self.conv_out = CausalConv(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, z: Float[Array, "B f h w C"], cache: ChunkCache | None
    ) -> tuple[Float[Array, "B F height width E"], ChunkCache]:
        return self.chunk([self.mid_block, *self.up_blocks], z, z, cache)


class AutoencoderKLCogVideoX(nnx.Module):
    """Both directions speak the sampler's latents, `posterior * scaling_factor`, chunk by chunk.

    `frame_chunks` and `video_chunks` cut a video. The cache that a call returns is the next call's argument, and of no
    use after it: donate it. The decoder's has 2.8 GB in bfloat16 at 480 x 720.
    """

    def __init__(self, config: VideoAutoencoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def decode_first(self, z: Float[Array, "B f h w C"]) -> tuple[Float[Array, "B F height width E"], ChunkCache]:
        """Frames, about -1 to 1 and not clipped, from a video's first 1 to 3 latent frames, of any float dtype.

        Raises:
            ValueError: more latent frames.
        """
        if z.shape[1] > LATENT_CHUNK + 1:
            raise ValueError(
                f"decode_first takes up to {LATENT_CHUNK + 1} latent frames, got {z.shape[1]}: see frame_chunks"
            )
        return self.decoder(self._unscaled(z), None)

    def decode_next(
        self, z: Float[Array, "B f h w C"], cache: ChunkCache
    ) -> tuple[Float[Array, "B F height width E"], ChunkCache]:
        """The frames that follow, from 2 more latent frames and what the call before returned.

        Raises:
            ValueError: another number of latent frames.
        """
        if z.shape[1] != LATENT_CHUNK:
            raise ValueError(f"decode_next takes {LATENT_CHUNK} latent frames, got {z.shape[1]}: see frame_chunks")
        return self.decoder(self._unscaled(z), cache)

    def encode_first(self, frames: Float[Array, "B F height width C"]) -> tuple[Float[Array, "B f h w E"], ChunkCache]:
        """Latents, the posterior's mean, from a video's first 1 to 15 frames, in -1 to 1.

        Raises:
            ValueError: more frames.
        """
        if (number := frames.shape[1]) >= 2 * VIDEO_CHUNK:
            most = 2 * VIDEO_CHUNK - 1
            raise ValueError(f"encode_first takes up to {most} frames, got {number}: see video_chunks")
        moments, cache = self.encoder(frames.astype(self.dtype), None)
        return self._scaled_mean(moments), cache

    def encode_next(
        self, frames: Float[Array, "B F height width C"], cache: ChunkCache
    ) -> tuple[Float[Array, "B f h w E"], ChunkCache]:
        """The latents that follow, from 8 more frames and what the call before returned.

        Raises:
            ValueError: another number of frames.
        """
        if frames.shape[1] != VIDEO_CHUNK:
            raise ValueError(f"encode_next takes {VIDEO_CHUNK} frames, got {frames.shape[1]}: see video_chunks")
        moments, cache = self.encoder(frames.astype(self.dtype), cache)
        return self._scaled_mean(moments), cache

    def _unscaled(self, z: Float[Array, "B f h w C"]) -> Float[Array, "B f h w C"]:
        return (z.astype(jnp.float32) / self.config.scaling_factor).astype(self.dtype)

    def _scaled_mean(self, moments: Float[Array, "B f h w M"]) -> Float[Array, "B f h w E"]:
        mean = moments[..., : self.config.latent_channels].astype(jnp.float32)
        return (mean * self.config.scaling_factor).astype(self.dtype)
