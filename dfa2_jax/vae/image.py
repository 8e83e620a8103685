"""AutoencoderKL: latents to images and back. Names follow diffusers' class of that name; arrays are NHWC throughout.

Runs in its parameters' dtype. diffusers' `force_upcast` is ignored, as its SD3 and FLUX pipelines ignore it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.io.errors import check_fields
from dfa2_jax.nn.config import config_from_json
from dfa2_jax.vae.blocks import DownBlock, GroupNorm, MidBlock, UpBlock, conv
from dfa2_jax.vae.chunks import Chunk
from dfa2_jax.vae.tiles import Axis, Tiles

# config.json fields with one value that is implemented, which is also diffusers' default: SD3's and FLUX.1's.
IMPLEMENTED = {"act_fn": "silu", "mid_block_add_attention": True, "latents_mean": None, "latents_std": None}

OVERLAP = 0.25
"""The share of a tile that is blended (diffusers 0.42.1, AutoencoderKL's `tile_overlap_factor`)."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """diffusers' fields, with diffusers' defaults where a config.json may leave them out."""

    tiles_itself: ClassVar[bool] = True

    block_out_channels: tuple[int, ...]  # from the image's end to the latents'
    layers_per_block: int = 1  # of the encoder; the decoder has one more
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    sample_size: int = 32  # pixels of a side that the autoencoder was made for: tiles are as large
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self):
        check_fields(self)
        if not 0 < len(self.block_out_channels) < 10:
            raise ValueError(f"VAE config: {len(self.block_out_channels)=} must be from 1 to 9 levels")
        if self.scaling_factor <= 0:
            raise ValueError(f"VAE config: {self.scaling_factor=} must be positive: latents are divided by it")
        bad = [channels for channels in self.block_out_channels if channels % self.norm_num_groups]
        if bad:
            raise ValueError(f"VAE config: {self.block_out_channels=} must be multiples of {self.norm_num_groups=}")

    def chunks(self, latent_frames: int) -> list[Chunk]:
        """One picture at a time: another batch size compiles nothing, and activations stay those of one."""
        return [Chunk(number, 1) for number in range(latent_frames)]

    def drawn(
        self, moments: Float[np.ndarray, "B h w M"], noise: Float[np.ndarray, "*noise"]
    ) -> Float[np.ndarray, "B h w C"]:
        """Latents as the sampler takes them, from what `encode` returns."""
        mean, log_variance = np.split(moments, 2, axis=-1)
        deviation = np.exp(np.clip(log_variance, -30, 20) / 2)  # diffusers' DiagonalGaussianDistribution
        return (mean + deviation * noise - (self.shift_factor or 0.0)) * self.scaling_factor

    def num_frames(self, latent_frames: int) -> int:
        """Each is a picture."""
        return latent_frames

    def tiles(self) -> Tiles:
        """As large as the images that the autoencoder was made for.

        Raises:
            ValueError: they do not meet.
        """
        scale = 2 ** (len(self.block_out_channels) - 1)
        axis = Axis.meeting(self.sample_size, OVERLAP, scale, f"the VAE's sample_size={self.sample_size}")
        return Tiles(axis, axis, scale)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "AutoencoderConfig":
        """From diffusers' parsed config.json. Raises ValueError for what this model cannot be."""
        for name, value in IMPLEMENTED.items():
            if json.get(name, value) != value:
                raise ValueError(f"VAE config: {name}={json[name]!r}, but only {value!r} is implemented")
        size = json.get("sample_size", cls.sample_size)
        config = config_from_json(cls, {**json, "sample_size": size[0] if isinstance(size, list | tuple) else size})
        for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            wanted = [block] * len(config.block_out_channels)
            if list(json.get(name, wanted)) != wanted:
                raise ValueError(f"VAE config: {name}={json[name]!r}, but only {wanted!r} is implemented")
        return config


class Encoder(nnx.Module):
    def __init__(self, config: AutoencoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            DownBlock(
                config.layers_per_block,
                widths[max(level - 1, 0)],
                width,
                groups,
                downsample=level < len(widths) - 1,
                dtype=dtype,
                rngs=rngs,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, dtype=dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, dtype=dtype)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B height width C"]) -> Float[Array, "B h w E"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: AutoencoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv(config.latent_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, dtype=dtype, rngs=rngs)
        self.up_blocks = nnx.List(
            UpBlock(
                config.layers_per_block + 1,
                widths[max(level - 1, 0)],
                width,
                groups,
                upsample=level < len(widths) - 1,
                dtype=dtype,
                rngs=rngs,
            )
            for level, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, dtype=dtype)
        self.conv_out = conv(widths[-1], config.out_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B height width E"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Decodes the sampler's latents, which are `(posterior - shift_factor) * scaling_factor`: `drawn` makes them."""

    def __init__(self, config: AutoencoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels = config.latent_channels
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = conv(2 * channels, 2 * channels, 1, dtype=dtype, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = (
            conv(channels, channels, 1, dtype=dtype, rngs=rngs) if config.use_post_quant_conv else None
        )
        self.config = config
        self.dtype = dtype

    def decode(self, z: Float[Array, "B h w C"]) -> Float[Array, "B height width E"]:
        """Images, about -1 to 1 and not clipped, from latents as the sampler leaves them, of any float dtype."""
        z = z.astype(jnp.float32) / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        z = z.astype(self.dtype)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def encode(self, images: Float[Array, "B height width C"]) -> Float[Array, "B h w M"]:
        """The posterior's mean and the logarithm of its variance, float32, from images in -1 to 1."""
        moments = self.encoder(images.astype(self.dtype))
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        return moments.astype(jnp.float32)
