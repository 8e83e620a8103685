"""Compiles what a call will run, before its bar starts."""

import jax
import numpy as np

from dfa2_jax.pipeline import components
from dfa2_jax.pipeline.call import Call


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


@jax.enable_x64(False)
def compile_decoder(call: Call) -> None:
    """`pipeline.decode` of the call's images then compiles nothing."""
    pipeline, vae = call.pipeline, call.pipeline.networks["vae"]
    latents = pipeline.family.tokens.unpack(call.tokens[:1], call.grid)[:, :, 0]
    channels, rows, columns = latents.shape[1:]
    image = pipeline.put_image(np.zeros((1, rows, columns, channels), np.float32))
    components.call.lower(vae.graph, vae.params, image, method="decode").compile()
