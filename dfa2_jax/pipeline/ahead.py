"""Compiles what a call will run, before its bar starts."""

import jax
import numpy as np

from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.decoding import compile_chunks


@jax.enable_x64(False)  # as the programs run
def compile_ahead(call: Call) -> None:
    """The loop and the decoder; `call.run` and `call.images` then compile nothing.

    Raises:
        MemoryError: what attention remembers does not fit.
    """
    run, state = call.program(call.options.plan)
    jax.block_until_ready(run(state, 0, 0).latents)  # no step: the same program as all steps
    if call.request.output_type != "latent":
        compile_decoder(call)


def compile_decoder(call: Call) -> None:
    """`pipeline.decode` of the call's images then compiles nothing."""
    (latents,), pipeline = call.latents(call.tokens[:1]).transpose(0, 2, 3, 4, 1), call.pipeline
    tiles = pipeline.tiles(call.options.vae_tiling)
    compile_chunks(pipeline.networks["vae"], np.asarray(latents, np.float32), pipeline.put_image, tiles)
