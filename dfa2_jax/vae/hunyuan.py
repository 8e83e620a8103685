"""AutoencoderKLHunyuanVideo: latents to videos.

Names follow diffusers' class of that name; arrays are NFHWC throughout.

A video is decoded in windows of latent frames that overlap, and each fades into the next. The windows are part of the
model: norms see the frames of their window alone. Runs in its parameters' dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.io.errors import check_fields
from dfa2_jax.nn.config import config_from_json
from dfa2_jax.vae.blocks import GroupNorm
from dfa2_jax.vae.causal import PixelConv
from dfa2_jax.vae.chunks import Chunk
from dfa2_jax.vae.hunyuan_blocks import EdgeConv, MidBlock, UpBlock, activated
from dfa2_jax.vae.tiles import Axis, Tiles

# config.json fields with one value that is implemented: the published model's, and diffusers' default.
IMPLEMENTED = {"act_fn": "silu", "mid_block_add_attention": True, "temporal_compression_ratio": 4}

TIME = IMPLEMENTED["temporal_compression_ratio"]
"""Frames of a latent frame; the first has one."""

WINDOW, STRIDE = 5, 3
"""Latent frames of a window, and from one to the next. Of a later window's frames, the first is the window's before."""

TILE, TILE_STRIDE = 256, 192
"""Pixels of a tile's sides, and from a tile to the next, as diffusers' `enable_tiling` has them."""


@dataclass(frozen=True, kw_only=True)
class HunyuanAutoencoderConfig:
    """diffusers' fields that a decoder has, with diffusers' defaults, which are the published model's."""

    tiles_itself: ClassVar[bool] = True

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # from the video's end to the latents'
    layers_per_block: int = 2  # of the encoder; the decoder has one more
    latent_channels: int = 16
    out_channels: int = 3
    norm_num_groups: int = 32
    spatial_compression_ratio: int = 8
    scaling_factor: float = 0.476986

    def __post_init__(self):
        check_fields(self)
        levels = len(self.block_out_channels)
        if not 3 <= levels <= 7:  # frames double twice, and tiles are of whole latents
            raise ValueError(f"Video VAE config: {len(self.block_out_channels)=} must be from 3 to 7 levels")
        if self.spatial_compression_ratio != (ratio := 2 ** (levels - 1)):
            raise ValueError(
                f"Video VAE config: {self.spatial_compression_ratio=}, but only {ratio} is implemented, of {levels=}"
            )
        if self.scaling_factor <= 0:
            raise ValueError(f"Video VAE config: {self.scaling_factor=} must be positive: latents are divided by it")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"Video VAE config: {self.block_out_channels=} must be multiples of {self.norm_num_groups=}"
            )

    @property
    def scale(self) -> int:
        """Pixels along a side of one latent pixel."""
        return self.spatial_compression_ratio

    @property
    def temporal_compression_ratio(self) -> int:
        return TIME

    def chunks(self, latent_frames: int) -> list[Chunk]:
        """The windows. One of a single latent frame would have no frame of its own, so that there is none.

        Raises:
            ValueError: there is no frame.
        """
        if latent_frames < 1:
            raise ValueError(f"A video needs frames, got {latent_frames=}: ask for at least 1")
        first = Chunk(slice(0, min(WINDOW, latent_frames)), self.num_frames(min(STRIDE + 1, latent_frames)))
        later = [
            Chunk(
                slice(start, min(start + WINDOW, latent_frames)),
                TIME * min(STRIDE, latent_frames - 1 - start),
                dropped=1,
                blended=TIME * (WINDOW - 1 - STRIDE),
            )
            for start in range(STRIDE, latent_frames - 1, STRIDE)
        ]
        return [first, *later]

    def num_frames(self, latent_frames: int) -> int:
        """Frames that latent frames are decoded to: 4F - 3."""
        return TIME * (latent_frames - 1) + 1

    def tiles(self) -> Tiles:
        """256 pixels high and wide."""
        axis = Axis(TILE // self.scale, TILE_STRIDE // self.scale, TILE - TILE_STRIDE)
        return Tiles(axis, axis, self.scale)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "HunyuanAutoencoderConfig":
        """From diffusers' parsed config.json. Raises ValueError for what this model cannot be."""
        for name, value in IMPLEMENTED.items():
            if json.get(name, value) != value:
                raise ValueError(f"Video VAE config: {name}={json[name]!r}, but only {value!r} is implemented")
        config = config_from_json(cls, json)
        wanted = ["HunyuanVideoUpBlock3D"] * len(config.block_out_channels)
        if list(json.get(name := "up_block_types", wanted)) != wanted:
            raise ValueError(f"Video VAE config: {name}={json[name]!r}, but only {wanted!r} is implemented")
        return config


class Decoder(nnx.Module):
    def __init__(self, config: HunyuanAutoencoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups, last = (
            config.block_out_channels[::-1],
            config.norm_num_groups,
            len(config.block_out_channels) - 1,
        )
        self.conv_in = EdgeConv(config.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, dtype=dtype, rngs=rngs)
        self.up_blocks = nnx.List(
            UpBlock(
                config.layers_per_block + 1,
                widths[max(level - 1, 0)],
                width,
                groups,
                upsample=level < last,
                upsample_frames=level >= last - 2,
                dtype=dtype,
                rngs=rngs,
            )
            for level, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, dtype=dtype)
        self.conv_out = EdgeConv(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, z: Float[Array, "B f h w C"]) -> Float[Array, "B F height width E"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(activated(self.conv_norm_out, x))


class AutoencoderKLHunyuanVideo(nnx.Module):
    """Latents are the sampler's, `posterior * scaling_factor`. Of the two directions, the decoder is here."""

    def __init__(self, config: HunyuanAutoencoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels = config.latent_channels
        self.post_quant_conv = PixelConv(channels, channels, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def decode(self, z: Float[Array, "B f h w C"]) -> Float[Array, "B F height width E"]:
        """Frames, about -1 to 1 and not clipped, of a window of 1 to 5 latent frames, of any float dtype.

        Raises:
            ValueError: more latent frames.
        """
        if z.shape[1] > WINDOW:
            raise ValueError(f"decode takes up to {WINDOW} latent frames, got {z.shape[1]}: see chunks of the config")
        z = (z.astype(jnp.float32) / self.config.scaling_factor).astype(self.dtype)
        return self.decoder(self.post_quant_conv(z))
