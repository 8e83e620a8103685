"""Latents to pixels: a picture at a time, a video chunk by chunk."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from dfa2_jax.pipeline.components import Component
from dfa2_jax.vae.tiles import Canvas, Tiles
from dfa2_jax.vae.video import AutoencoderKLCogVideoX, VideoAutoencoderConfig, frame_chunks

Put = Callable[[np.ndarray], Any]
"""Puts latents where the devices want them."""

OnFrames = Callable[[int, int, np.ndarray], Any]
"""Called with the number of a video, the number of a frame in it, and the frames [f, H, W, 3] from there on."""


def is_of_video(vae: Component) -> bool:
    return vae.kind is AutoencoderKLCogVideoX


def frames_of(
    vae: Component,
    latents: Float[np.ndarray, "F h w C"],
    put: Put,
    tiles: Tiles | None = None,
    decoded: Callable[[int], Any] = lambda frames: None,
) -> Iterator[Float[np.ndarray, "f H W 3"]]:
    """Frames in [0, 1], as they are ready.

    Tiles are decoded one after the other, so that the memory of one is held: frames are ready with the last tile.

    Args:
        decoded: told of how many frames a part of a video has been decoded.
    """
    height, width = latents.shape[1:3]
    parts = parts_of(latents, tiles)
    canvases: list[Canvas] = []
    for part in parts:
        for number, pixels in enumerate(pixels_of(vae, latents[:, *part], put)):
            if tiles is not None and len(parts) > 1:
                if part is parts[0]:
                    canvases.append(Canvas(tiles, len(pixels), height, width))
                canvases[number].put(part, pixels)
                pixels = canvases[number].pixels
            decoded(len(pixels))
            if part is parts[-1]:
                yield np.clip(pixels / 2 + 0.5, 0, 1)


def pixels_of(
    vae: Component, latents: Float[np.ndarray, "F h w C"], put: Put
) -> Iterator[Float[np.ndarray, "f H W 3"]]:
    """Frames, about -1 to 1, as they are ready.

    One picture at a time: another batch size compiles nothing, and activations stay those of one. A video's chunks are
    part of its model. What one hands to the next is given away, so that the memory of one is held.
    """
    carried = None
    for chunk in chunks_of(vae, latents):
        if not is_of_video(vae):
            frames = vae(put(chunk), method="decode")
        elif carried is None:
            frames, carried = vae(put(chunk[None]), method="decode_first")
        else:
            frames, carried = vae.carry(put(chunk[None]), carried, method="decode_next")
        pixels = np.asarray(frames, np.float32)
        yield pixels.reshape(-1, *pixels.shape[-3:])


def parts_of(latents: Float[np.ndarray, "F h w C"], tiles: Tiles | None) -> list[tuple[slice, slice]]:
    """Rows and columns of latents that are decoded at once."""
    height, width = latents.shape[1:3]
    return [(slice(0, height), slice(0, width))] if tiles is None else tiles.parts(height, width)


def in_bytes(frames: Float[np.ndarray, "*F H W 3"]) -> UInt8[np.ndarray, "*F H W 3"]:
    return (np.nan_to_num(frames) * 255).round().astype(np.uint8)


def num_frames(config: Any, latent_frames: int) -> int:
    """Frames that latent ones decode to, by the autoencoder's config."""
    return config.num_frames(latent_frames) if isinstance(config, VideoAutoencoderConfig) else latent_frames


def chunks_of(vae: Component, latents: Float[np.ndarray, "F h w C"]) -> list[Float[np.ndarray, "f h w C"]]:
    """Latent frames that the autoencoder decodes at once."""
    count = len(latents)
    return [latents[part] for part in (frame_chunks(count) if is_of_video(vae) else np.arange(count)[:, None])]


def compile_chunks(vae: Component, latents: Float[np.ndarray, "F h w C"], put: Put, tiles: Tiles | None = None) -> int:
    """`frames_of` such latents then compiles nothing. Tiles of one size share their programs.

    Returns:
        Bytes that the largest program takes on a device, beside weights.
    """
    programs = []
    sizes = {(y.stop - y.start, x.stop - x.start): (y, x) for y, x in parts_of(latents, tiles)}
    for part in sizes.values():
        first, *later = chunks_of(vae, latents[:, *part])
        if not is_of_video(vae):
            programs.append(vae.compile(put(first), method="decode"))
            continue
        programs.append(vae.compile(put(first[None]), method="decode_first"))
        if later:
            _, carried = programs[-1].returned
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), carried)
            programs.append(vae.compile(put(later[0][None]), shapes, method="decode_next", carries=True))
    return max(program.nbytes for program in programs)
