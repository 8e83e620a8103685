import re
from functools import cache
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from lowering import assert_highest_precision, largest_intermediate, lower_for_cuda
from torch_models import load, redraw, relative_error

from dfa2_jax.vae.blocks import chunked_attention
from dfa2_jax.vae.image import AutoencoderConfig, AutoencoderKL

SD3 = dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False)
MODELS: dict[str, dict[str, Any]] = {
    "four_levels": dict(block_out_channels=(16, 16, 24, 32), layers_per_block=1, use_post_quant_conv=False, **SD3),
    "three_levels": dict(block_out_channels=(16, 32, 32), layers_per_block=2, use_post_quant_conv=False, **SD3),
    # Stable Diffusion 1's kind: quant convolutions, no shift.
    "quant": dict(block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, scaling_factor=0.18215),
}


def rename(name: str) -> str:
    name = name.replace("attentions.0", "attention").replace("to_out.0", "to_out")
    name = re.sub(r"(up|down)samplers\.0\.conv", r"\1sampler", name)
    return name.replace("weight", "scale" if "norm" in name else "kernel")


@cache
def reference(name: str) -> torch.nn.Module:
    levels = len(MODELS[name]["block_out_channels"])
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    return redraw(diffusers.AutoencoderKL(norm_num_groups=8, **blocks, **MODELS[name]), 0.08)


@cache
def model(name: str, dtype: Any = jnp.float32) -> AutoencoderKL:
    config = AutoencoderConfig.from_json(dict(reference(name).config))
    return load(lambda: AutoencoderKL(config, dtype=dtype, rngs=nnx.Rngs(0)), reference(name), rename)


def latents_and_images(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Two of each, not square, NHWC."""
    rng, factor = np.random.default_rng(0), 2 ** (len(MODELS[name]["block_out_channels"]) - 1)
    latents = rng.standard_normal((2, 6, 10, MODELS[name]["latent_channels"])).astype(np.float32)
    return latents, rng.uniform(-1, 1, (2, 6 * factor, 10 * factor, 3)).astype(np.float32)


def diffusers_decode(vae: Any, latents: np.ndarray) -> torch.Tensor:
    """As pipeline_stable_diffusion_3 calls it."""
    z = torch.tensor(latents).permute(0, 3, 1, 2).to(vae.dtype)
    with torch.no_grad():
        image = vae.decode(z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0), return_dict=False)[0]
    return image.permute(0, 2, 3, 1)


def diffusers_encode(vae: Any, images: np.ndarray) -> torch.Tensor:
    """The posterior's mean and the logarithm of its variance, one beside the other."""
    x = torch.tensor(images).permute(0, 3, 1, 2).to(vae.dtype)
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1).float().permute(0, 2, 3, 1)


decode = jax.jit(lambda vae, z: vae.decode(z))
encode = jax.jit(lambda vae, x: vae.encode(x))


@pytest.mark.parametrize("name", MODELS)
def test_equals_diffusers(name):
    latents, images = latents_and_images(name)
    errors = {
        "decode": relative_error(decode(model(name), latents), diffusers_decode(reference(name), latents)),
        "encode": relative_error(encode(model(name), images), diffusers_encode(reference(name), images)),
    }
    print(name, errors)
    assert all(error <= 1e-5 for error in errors.values()), errors  # `max` would pass over a NaN


def test_bfloat16_is_as_near_as_torch():
    name = "four_levels"
    latents, images = latents_and_images(name)
    exact = diffusers_decode(reference(name), latents), diffusers_encode(reference(name), images)
    rounded_vae = reference(name).to(torch.bfloat16)
    rounded = diffusers_decode(rounded_vae, latents), diffusers_encode(rounded_vae, images)
    reference.cache_clear()  # `.to` changed it in place
    vae = model(name, jnp.bfloat16)
    assert decode(vae, latents).dtype == jnp.bfloat16 and encode(vae, images).dtype == jnp.float32
    for ours, theirs, true in zip((decode(vae, latents), encode(vae, images)), rounded, exact, strict=True):
        error, torch_error = relative_error(ours, true), relative_error(theirs, true)
        print(f"{error=:.2e} {torch_error=:.2e}")
        assert error <= 1.5 * torch_error


@pytest.mark.parametrize("max_scores", [1, 1000, 2 * 60 * 7, 10**6])
def test_chunks_equal_dense_attention(max_scores):
    """Chunks of one query, a ragged last chunk, and all queries at once."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 60, 16)).astype(np.float32)
    dense = torch.nn.functional.scaled_dot_product_attention(*(torch.tensor(x).double() for x in (q, k, v)))
    ours = jax.jit(lambda *qkv: chunked_attention(*qkv, max_scores=max_scores))(q, k, v)
    assert relative_error(ours, dense) <= 1e-6


@pytest.mark.parametrize("batch, pixels", [(1, 512), (1, 2048), (4, 2048), (1, 4096)])
def test_mid_attention_holds_few_scores(batch, pixels):
    """At 2048 px all scores would be 2**32, 16 GiB."""
    num_tokens = (pixels // 8) ** 2
    qkv = [jax.ShapeDtypeStruct((batch, num_tokens, 64), jnp.bfloat16)] * 3
    assert largest_intermediate(chunked_attention, *qkv) <= 2**26 + batch * num_tokens


def test_decode_holds_no_scores_at_2048_px():
    """In the published decoder nothing is larger than the widest image: 256 channels of 2048 x 2048."""
    config = AutoencoderConfig(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, use_post_quant_conv=False, **SD3
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    latents = jax.ShapeDtypeStruct((1, 256, 256, 16), jnp.bfloat16)
    assert largest_intermediate(lambda p, z: nnx.merge(graph, p).decode(z), params, latents) == 256 * 2048**2


def test_float32_asks_for_ieee_products():
    latents, images = latents_and_images("quant")
    assert_highest_precision(lower_for_cuda(lambda vae, z: vae.decode(z), model("quant"), latents))
    assert_highest_precision(lower_for_cuda(lambda vae, x: vae.encode(x), model("quant"), images))


def test_latents_are_scaled_in_float32():
    latents, _ = latents_and_images("quant")
    rounded = jnp.asarray(latents, jnp.bfloat16)
    exact = decode(model("quant"), rounded.astype(jnp.float32))
    np.testing.assert_array_equal(decode(model("quant"), rounded), exact)
    assert decode(model("quant", jnp.bfloat16), rounded.astype(jnp.float16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "field, value",
    [
        ("act_fn", "relu"),
        ("mid_block_add_attention", False),
        ("latents_mean", [0.0] * 16),
        ("down_block_types", ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
    ],
)
def test_refuses_other_architectures(field, value):
    json = {"block_out_channels": [32, 64], "_class_name": "AutoencoderKL", "sample_size": 32}
    assert AutoencoderConfig.from_json(json).block_out_channels == (32, 64)
    with pytest.raises(ValueError, match=f"{field}="):
        AutoencoderConfig.from_json(json | {field: value})


def test_refuses_indivisible_groups():
    with pytest.raises(ValueError, match=r"\(32, 40\).*norm_num_groups=32"):
        AutoencoderConfig.from_json({"block_out_channels": [32, 40]})
