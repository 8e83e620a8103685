"""Compiles what a call will run, before its bar starts, and looks whether what it makes can be decoded."""

import logging
import math
from contextlib import suppress
from dataclasses import replace

import jax
import numpy as np

from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.decoding import compile_chunks, parts_of
from dfa2_jax.vae.tiles import Tiles
from dfa2_jax.weights.room import counted_bytes

logger = logging.getLogger("dfa2_jax")


@jax.enable_x64(False)  # as the programs run
def compile_ahead(call: Call) -> Call:
    """The decoder and the loop; `run` and `images` of the call that is returned then compile nothing.

    Raises:
        MemoryError: what attention remembers does not fit, or what the decoder needs.
    """
    if call.request.output_type != "latent":
        call = compile_decoder(call)
    run, state = call.program(call.plan)
    jax.block_until_ready(run(state, 0, 0).latents)  # no step: the same program as all steps
    return call


def check_decoder(call: Call) -> Call:
    """As `compile_decoder` where memory may be refused; elsewhere nothing is compiled.

    Raises:
        MemoryError: what the decoder needs does not fit.
    """
    return compile_decoder(call) if counts_memory(call) else call


def counts_memory(call: Call) -> bool:
    """Whether decoding may be refused: there is some, and the device counts its memory."""
    return call.request.output_type != "latent" and _free_bytes(call) is not None


def compile_decoder(call: Call) -> Call:
    """`images` of the call that is returned then compiles nothing; it may have tiles, unasked for (`Decodes`).

    Raises:
        MemoryError: what the decoder needs does not fit; the message says what would.
    """
    need, free, request = _need(call), _free_bytes(call), call.request
    if free is not None and need > free and call.pipeline.networks.release_text_encoders():
        free = _free_bytes(call)
    if free is None or need <= free:
        return call
    what = "an image" if request.num_frames is None else f"a video of {request.num_frames} frames"
    said = (
        f"The VAE takes {need / 1e9:.1f} GB to decode {what} of {request.height} x {request.width} px, and "
        f"{free / 1e9:.1f} GB are free"
    )
    if call.pipeline.networks.config("vae").tiles_itself and not call.options.vae_tiling:
        tiled = replace(call, options=replace(call.options, vae_tiling=True))
        less = _need(tiled)
        if less <= free:
            logger.warning("%s: it decodes in tiles, as with vae_tiling=True, which take %.1f GB", said, less / 1e9)
            return tiled
        call, need = tiled, less
    raise MemoryError(f"{said}: {_advice(call, need, free)}.")


def _need(call: Call) -> int:
    """Bytes that decoding takes, once it is compiled."""
    pipeline = call.pipeline
    tiles = pipeline.tiles(call.options.vae_tiling)
    return compile_chunks(pipeline.networks["vae"], _latents(call), pipeline.put_image, tiles)


def _free_bytes(call: Call) -> int | None:
    mesh = call.pipeline.own_mesh
    return counted_bytes(() if mesh is None else mesh.members)


def _latents(call: Call) -> np.ndarray:
    """[F, h, w, C] of one image or video."""
    (latents,) = call.latents(call.tokens[:1]).transpose(0, 2, 3, 4, 1)
    return np.asarray(latents, np.float32)


def _advice(call: Call, need: int, free: int) -> str:
    """What takes less: memory grows with the pixels that are decoded at once."""
    pipeline, latents, is_tiled = call.pipeline, _latents(call), call.options.vae_tiling
    at_once = _at_once(latents, pipeline.tiles(is_tiled))
    if not is_tiled:
        with suppress(ValueError):  # tiles that do not meet
            tiled = need * math.prod(_at_once(latents, pipeline.tiles(True))) / math.prod(at_once)
            if tiled <= free:
                return f"vae_tiling=True takes about {tiled / 1e9:.1f} GB"
    scale, multiple = pipeline.sizes.vae_scale, pipeline.sizes.multiple
    sides = [int(side * scale * math.sqrt(free / need)) // multiple * multiple for side in at_once]
    return f"about {sides[0]} x {sides[1]} px would fit" if min(sides) else "take a device with more memory"


def _at_once(latents: np.ndarray, tiles: Tiles | None) -> tuple[int, int]:
    """Height and width of what is decoded at once: no tile is larger than the first."""
    rows, columns = parts_of(latents, tiles)[0]
    return rows.stop, columns.stop
