"""FLUX.1's autoencoder compiled for an H200: what whole images take, and what a tile does."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dfa2_jax.vae.image import AutoencoderConfig, AutoencoderKL
from pallas_kernels.inspect import aot

CONFIG = AutoencoderConfig(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
    sample_size=1024,
)
PEAKS = {1024: (1.5e9, 0.9e9), 2048: (5.6e9, 3.4e9), 4096: (21.8e9, 13.3e9)}
"""By pixels of a side, bytes that decoding and encoding need at most, 0.17 GB of weights among them."""


def peak(method, shape):
    graph, params = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    program, target = jax.jit(lambda p, x: getattr(nnx.merge(graph, p), method)(x)), aot.target("h200")
    arguments = target.abstract((params, jax.ShapeDtypeStruct(shape, jnp.float32)))
    return aot.compile_for(target, program, *arguments).peak_bytes


@pytest.mark.aot
@pytest.mark.parametrize("pixels", PEAKS)
def test_whole_images_fit(pixels):
    decoding, encoding = PEAKS[pixels]
    assert 0.9 * decoding < peak("decode", (1, pixels // 8, pixels // 8, 16)) < decoding
    assert 0.9 * encoding < peak("encode", (1, pixels, pixels, 3)) < encoding


def test_no_tile_is_larger_than_1024_px():
    """So tiles take what an image of that size takes, whatever the image is."""
    for rows, columns in CONFIG.tiles().parts(4096 // 8, 4096 // 8):
        assert rows.stop - rows.start <= 128 and columns.stop - columns.start <= 128
