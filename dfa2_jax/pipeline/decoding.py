"""Latents to pixels: a picture at a time, a video chunk by chunk.

The autoencoder's config says what a chunk is, and how chunks are joined (`vae.chunks`).
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from dfa2_jax.pipeline.components import Component
from dfa2_jax.vae.chunks import Chunk
from dfa2_jax.vae.tiles import Canvas, Tiles

Put = Callable[[np.ndarray], Any]
"""Puts latents where the devices want them."""

OnFrames = Callable[[int, int, np.ndarray], Any]
"""Called with the number of a video, the number of a frame in it, and the frames [f, H, W, 3] from there on."""

Part = tuple[slice, slice]
"""Rows and columns of latents."""


def frames_of(
    vae: Component,
    latents: Float[np.ndarray, "F h w C"],
    put: Put,
    tiles: Tiles | None = None,
    decoded: Callable[[int], Any] = lambda frames: None,
) -> Iterator[Float[np.ndarray, "f H W 3"]]:
    """Frames in [0, 1], as they are ready.

    Tiles are decoded one after the other, so that the memory of one is held. Where chunks share a cache, frames are
    ready with the last tile.

    Args:
        decoded: told, with each tile of a chunk, how many frames it is of.
    """
    chunks, parts, canvases, before = chunks_of(vae, latents), parts_of(latents, tiles), {}, None
    for number, part, pixels in pixels_of(vae, latents, put, parts):
        if tiles is not None and len(parts) > 1:
            if part is parts[0]:
                canvases[number] = Canvas(tiles, len(pixels), *latents.shape[1:3])
            canvases[number].put(part, pixels)
            pixels = canvases[number].pixels
        decoded(chunks[number].num_frames)
        if part is parts[-1]:
            canvases.pop(number, None)
            frames, before = chunks[number].join(pixels, before)
            yield np.clip(frames / 2 + 0.5, 0, 1)


def pixels_of(
    vae: Component, latents: Float[np.ndarray, "F h w C"], put: Put, parts: list[Part]
) -> Iterator[tuple[int, Part, Float[np.ndarray, "f y x 3"]]]:
    """Numbers of chunks, and parts, with their frames, about -1 to 1, as they are ready.

    A part whose chunks share a cache is decoded to its end. The cache is given away with each call, so that the memory
    of one is held.
    """
    chunks, cache = chunks_of(vae, latents), None
    order = list(product(range(len(chunks)), parts))
    if any(chunk.takes_cache for chunk in chunks):
        order = [(number, part) for part, number in product(parts, range(len(chunks)))]
    for number, part in order:
        chunk = chunks[number]
        z = put(seen_by(chunk, latents, part))
        returned = vae.carry(z, cache, method=chunk.method) if chunk.takes_cache else vae(z, method=chunk.method)
        frames, cache = returned if chunk.gives_cache else (returned, None)
        pixels = np.asarray(frames, np.float32)
        yield number, part, pixels.reshape(-1, *pixels.shape[-3:])


def chunks_of(vae: Component, latents: Float[np.ndarray, "F h w C"]) -> list[Chunk]:
    return vae.config.chunks(len(latents))


def parts_of(latents: Float[np.ndarray, "F h w C"], tiles: Tiles | None) -> list[Part]:
    """What is decoded at once of a frame."""
    height, width = latents.shape[1:3]
    return [(slice(0, height), slice(0, width))] if tiles is None else tiles.parts(height, width)


def seen_by(chunk: Chunk, latents: Float[np.ndarray, "F h w C"], part: Part) -> Float[np.ndarray, "1 *f y x C"]:
    """What the chunk's method takes: a batch of one."""
    return latents[:, *part][chunk.latents][None]


def in_bytes(frames: Float[np.ndarray, "*F H W 3"]) -> UInt8[np.ndarray, "*F H W 3"]:
    return (np.nan_to_num(frames) * 255).round().astype(np.uint8)


def compile_chunks(vae: Component, latents: Float[np.ndarray, "F h w C"], put: Put, tiles: Tiles | None = None) -> int:
    """`frames_of` such latents then compiles nothing. Chunks, or tiles, of one size share their programs.

    Returns:
        Bytes that the largest program takes on a device, beside weights.
    """
    programs, cache = {}, None
    for part in parts_of(latents, tiles):
        for chunk in chunks_of(vae, latents):
            z = seen_by(chunk, latents, part)
            key = chunk.method, z.shape
            if key not in programs:
                caches = [cache] if chunk.takes_cache else []
                programs[key] = vae.compile(put(z), *caches, method=chunk.method, carries=chunk.takes_cache)
            if chunk.gives_cache:
                _, cache = programs[key].returned
                cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), cache)
    return max(program.nbytes for program in programs.values())
