"""What sampling starts from: noise, a picture with noise over it, or latents that the caller gives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from dfa2_jax.io.arrays import host_array
from dfa2_jax.options import Options
from dfa2_jax.pipeline.loaded import Loaded
from dfa2_jax.pipeline.request import Request, seeds_of
from dfa2_jax.pipeline.source import Source
from dfa2_jax.sampling.known import Known, noised
from dfa2_jax.sampling.noise import BatchNoise
from dfa2_jax.sampling.tokens import Grid
from dfa2_jax.vae.tiles import Canvas, Tiles


@dataclass(frozen=True)
class Start:
    """Before the first step.

    tokens: patchified latents.
    seeds: one per image, None where the latents were given.
    known: what latents keep of a picture; None: nothing.
    beside: what tokens hold beside latents; None: nothing.
    reference: patchified latents of a picture that is seen beside them, and its rows and columns of tokens; None: none.
    """

    tokens: Float[np.ndarray, "B V P"]
    seeds: list[int | None]
    known: Known | None = None
    beside: Float[np.ndarray, "B V E"] | None = None
    reference: tuple[Float[np.ndarray, "B R P"], tuple[int, int]] | None = None


def start_of(
    pipeline: Loaded, options: Options, request: Request, grid: Grid, sigmas: Float[np.ndarray, " levels"]
) -> Start:
    """What a call starts from.

    A picture's latents are drawn from the autoencoder's posterior, out of the seed's stream before the noise is, as in
    diffusers. Given latents are the start, and where there is a mask, the noise too.

    Args:
        sigmas: noise levels from the first step on.
    """
    noise, tokens, source = noise_of(pipeline, options, request, grid), pipeline.family.tokens, request.source
    reference = None
    if source is not None and pipeline.family.defaults.reference_sizes:
        reference, source = reference_tokens(pipeline, source, request.batch, options.vae_tiling), None
    fills = getattr(pipeline.config, "beside_channels", 0) > 0
    encode = partial(encoded, pipeline, noise=noise, batch=request.batch, grid=grid, is_tiled=options.vae_tiling)
    image = None if source is None or (fills and options.latents is not None) else encode(source)
    seeds: list[int | None] = [None] * request.batch
    if options.latents is None:
        seeds = [*seeds_of(options.seed, request.batch)]
        drawn = tokens.pack_noise(noise.draw())
        latents = drawn if image is None else noised(image, drawn, float(sigmas[0]))
    else:
        drawn = latents = pipeline.given_tokens(host_array("latents", options.latents), request, grid)
    if source is None or source.mask is None:
        return Start(latents, seeds, reference=reference)
    if fills:
        return Start(latents, seeds, beside=beside(pipeline, source, encode))
    assert image is not None
    mask = mask_tokens(pipeline, source.mask, grid, request.batch)
    return Start(latents, seeds, Known.of(mask, image, drawn, sigmas))


def noise_of(pipeline: Loaded, options: Options, request: Request, grid: Grid) -> BatchNoise:
    """The noise of a call's seeds."""
    seeds, family = seeds_of(options.seed, request.batch), pipeline.family
    shape = family.tokens.noise_shape(family.latent_channels, grid)
    return BatchNoise(seeds if np.ndim(options.seed) else seeds[0], request.batch, shape)


def encoded(
    pipeline: Loaded, source: Source, *, noise: BatchNoise, batch: int, grid: Grid, is_tiled: bool
) -> Float[np.ndarray, "B V P"]:
    """The picture of each image of a batch, as patchified latents."""
    drawn = noise.draw(source.count).transpose(0, 2, 3, 1) if source.pixels is not None else None
    latents = latents_of(pipeline, source, drawn, is_tiled)
    patches = pipeline.family.tokens.pack(latents[:, :, None])
    if patches.shape[1] != grid.num_visual:
        raise ValueError(f"image holds latents {list(latents.shape)}: the call's images are of another size.")
    return np.tile(patches, (batch // len(patches), 1, 1))


def reference_tokens(
    pipeline: Loaded, source: Source, batch: int, is_tiled: bool
) -> tuple[Float[np.ndarray, "B R P"], tuple[int, int]]:
    """FLUX.1-Kontext's picture, of which the posterior's mean is taken, and its rows and columns of tokens."""
    latents, tokens = latents_of(pipeline, source, None, is_tiled), pipeline.family.tokens
    height, width, patch = *latents.shape[2:], pipeline.config.patch_size
    if height % patch or width % patch:
        raise ValueError(f"image holds {list(latents.shape)} latents, whose sides must be multiples of {patch}.")
    return np.tile(tokens.pack(latents[:, :, None]), (batch // len(latents), 1, 1)), (height // patch, width // patch)


def latents_of(
    pipeline: Loaded, source: Source, noise: Float[np.ndarray, "n h w C"] | None, is_tiled: bool
) -> Float[np.ndarray, "n C h w"]:
    """A picture's latents, drawn with this noise from the posterior; None: its mean."""
    if source.latents is not None:
        return source.latents
    assert source.pixels is not None
    pipeline.check_vae()
    tiles, vae = pipeline.tiles(is_tiled), pipeline.networks.config("vae")
    moments = np.concatenate([moments_of(pipeline, pixels, tiles) for pixels in source.pixels])
    return vae.drawn(moments, np.zeros(1, np.float32) if noise is None else noise).transpose(0, 3, 1, 2)


def moments_of(
    pipeline: Loaded, pixels: Float[np.ndarray, "H W 3"], tiles: Tiles | None
) -> Float[np.ndarray, "1 h w M"]:
    """What the autoencoder's posterior is drawn from, tile by tile where there are tiles."""

    def moments(part: Float[np.ndarray, "y x 3"]) -> np.ndarray:
        return np.asarray(pipeline.networks["vae"](pipeline.put_image(part[None]), method="encode"))

    if tiles is None:
        return moments(pixels)
    scale, canvas = pipeline.sizes.vae_scale, None
    height, width = pixels.shape[0] // scale, pixels.shape[1] // scale
    for rows, columns in tiles.parts(height, width):
        tile = moments(pixels[rows.start * scale : rows.stop * scale, columns.start * scale : columns.stop * scale])
        canvas = canvas or Canvas(tiles.of_latents, 1, height, width, tile.shape[-1])
        canvas.put((rows, columns), tile)
    assert canvas is not None
    return canvas.pixels


def mask_tokens(
    pipeline: Loaded, mask: Float[np.ndarray, "n H W"], grid: Grid, batch: int
) -> Float[np.ndarray, "B V P"]:
    """The mask of every number of a token: of the pixel that begins each latent one, as torch's nearest is."""
    scale = pipeline.sizes.vae_scale
    small = np.repeat(mask[:, None, None, ::scale, ::scale], pipeline.family.latent_channels, axis=1)
    tokens = pipeline.family.tokens.pack(small)
    return np.tile(tokens, (batch // len(tokens), 1, 1))


def beside(
    pipeline: Loaded, source: Source, encode: Callable[[Source], Float[np.ndarray, "B V P"]]
) -> Float[np.ndarray, "B V E"]:
    """FLUX.1-Fill's: latents of the picture, grey where it is painted anew, and the mask of every pixel.

    Raises:
        ValueError: the picture is given as latents.
    """
    if source.pixels is None or source.mask is None:
        raise ValueError("image must hold pixels, not latents: FLUX.1-Fill encodes what lies outside of the mask.")
    seen = encode(replace(source, pixels=source.pixels * (1 - source.mask[..., None])))
    scale, mask = pipeline.sizes.vae_scale, source.mask
    pixels = mask.reshape(len(mask), mask.shape[1] // scale, scale, -1, scale).transpose(0, 2, 4, 1, 3)
    tokens = pipeline.family.tokens.pack(pixels.reshape(len(mask), scale**2, 1, *pixels.shape[3:]))
    return np.concatenate([seen, np.tile(tokens, (len(seen) // len(tokens), 1, 1))], axis=-1)
