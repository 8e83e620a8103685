from copy import deepcopy
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
from torch_models import redraw, relative_error
from video_models import loaded, shapes_of, tensors_of

from dfa2_jax.pipeline.components import Component
from dfa2_jax.vae import causal
from dfa2_jax.vae.causal import MAX_SEEN
from dfa2_jax.vae.spec import VIDEO_AUTOENCODER
from dfa2_jax.vae.video import AutoencoderKLCogVideoX, VideoAutoencoderConfig, frame_chunks, video_chunks
from dfa2_jax.vae.video_blocks import CausalConv
from dfa2_jax.weights.rules import map_weights

MODELS: dict[str, dict[str, Any]] = {
    "four_levels": dict(block_out_channels=(8, 16, 16, 24), layers_per_block=1, scaling_factor=0.7),
    "three_levels": dict(block_out_channels=(8, 8, 16), layers_per_block=2, temporal_compression_ratio=2),
}
LATENTS = 4
DECODER_PARAMETERS, PARAMETERS, KEYS = 123_368_451, 215_583_907, 436  # of the published model


@cache
def reference(name: str) -> torch.nn.Module:
    levels = len(MODELS[name]["block_out_channels"])
    blocks = dict(down_block_types=("CogVideoXDownBlock3D",) * levels, up_block_types=("CogVideoXUpBlock3D",) * levels)
    vae = diffusers.AutoencoderKLCogVideoX(norm_num_groups=4, latent_channels=LATENTS, **blocks, **MODELS[name])
    return redraw(vae, 0.08)


@cache
def model(name: str, dtype: Any = jnp.float32) -> AutoencoderKLCogVideoX:
    return loaded(reference(name), dtype)


def latents(frames: int) -> np.ndarray:
    """Two videos, not square, NFHWC."""
    return np.random.default_rng(frames).standard_normal((2, frames, 2, 3, LATENTS)).astype(np.float32)


def diffusers_decode(vae: Any, z: np.ndarray) -> torch.Tensor:
    """As pipeline_cogvideox calls it."""
    channels_first = torch.tensor(z).permute(0, 4, 1, 2, 3).to(vae.dtype)
    with torch.no_grad():
        frames = vae.decode(1 / vae.config.scaling_factor * channels_first).sample
    return frames.permute(0, 2, 3, 4, 1)


def videos(frames: int) -> np.ndarray:
    """Two of them, not square, NFHWC."""
    return np.random.default_rng(frames).uniform(-1, 1, (2, frames, 16, 24, 3)).astype(np.float32)


def diffusers_encode(vae: Any, frames: np.ndarray) -> torch.Tensor:
    """The posterior's mean, scaled as training scales it."""
    channels_first = torch.tensor(frames).permute(0, 4, 1, 2, 3).to(vae.dtype)
    with torch.no_grad():
        mean = vae.encode(channels_first).latent_dist.mean
    return (mean * vae.config.scaling_factor).permute(0, 2, 3, 4, 1)


def through(vae: AutoencoderKLCogVideoX, x: np.ndarray, chunks: list[slice], method: str) -> np.ndarray:
    """The whole video, as a pipeline calls it chunk by chunk."""
    component, (first, *others) = Component(vae), chunks
    out, cache = component(x[:, first], method=f"{method}_first")
    parts = [out]
    for chunk in others:
        out, cache = component(x[:, chunk], cache, method=f"{method}_next")
        parts.append(out)
    return np.concatenate([np.asarray(part, np.float32) for part in parts], axis=1)


def decode(vae: AutoencoderKLCogVideoX, z: np.ndarray) -> np.ndarray:
    return through(vae, z, frame_chunks(z.shape[1]), "decode")


def encode(vae: AutoencoderKLCogVideoX, frames: np.ndarray) -> np.ndarray:
    return through(vae, frames, video_chunks(frames.shape[1]), "encode")


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4, 5, 6, 13])
def test_equals_diffusers(latent_frames):
    z = latents(latent_frames)
    ours = decode(model("four_levels"), z)
    error = relative_error(ours, diffusers_decode(reference("four_levels"), z))
    print(f"{latent_frames=} {ours.shape=} {error=:.2e}")
    assert error <= 1e-5
    assert ours.shape[1] == 4 * latent_frames - (3 if latent_frames % 2 else 0)
    assert ours.shape[1] == model("four_levels").config.num_frames(latent_frames)


@pytest.mark.parametrize("frames", [1, 9, 13, 17, 24])
def test_encoding_equals_diffusers(frames):
    """One frame, a first chunk with what is left over, one of nothing else, and chunks after it; an even number."""
    x = videos(frames)
    ours = encode(model("four_levels"), x)
    error = relative_error(ours, diffusers_encode(reference("four_levels"), x))
    print(f"{frames=} {ours.shape=} {error=:.2e}")
    assert error <= 1e-5
    assert ours.shape[1] == (frames + 3) // 4


@pytest.mark.parametrize("latent_frames", [3, 4])
def test_other_levels_and_ratios_equal_diffusers(latent_frames):
    z = latents(latent_frames)
    ours = decode(model("three_levels"), z)
    assert relative_error(ours, diffusers_decode(reference("three_levels"), z)) <= 1e-5
    assert ours.shape[1] == model("three_levels").config.num_frames(latent_frames)
    x = np.asarray(ours).clip(-1, 1)
    latents_again = encode(model("three_levels"), x)
    assert latents_again.shape == z.shape
    assert relative_error(latents_again, diffusers_encode(reference("three_levels"), x)) <= 1e-5


def test_bfloat16_is_as_near_as_torch():
    z, x, name = latents(5), videos(17), "four_levels"
    exact = diffusers_decode(reference(name), z), diffusers_encode(reference(name), x)
    vae, torch_vae = model(name, jnp.bfloat16), deepcopy(reference(name)).to(torch.bfloat16)
    rounded = diffusers_decode(torch_vae, z), diffusers_encode(torch_vae, x)
    for ours, theirs, true in zip((decode(vae, z), encode(vae, x)), rounded, exact, strict=True):
        error, torch_error = relative_error(ours, true), relative_error(theirs, true)
        print(f"{error=:.2e} {torch_error=:.2e}")
        assert error <= 1.5 * torch_error


def test_chunks_are_part_of_the_model():
    """All latent frames in one chunk are another video."""
    z, vae = latents(13), model("four_levels")
    whole, _ = jax.jit(lambda vae, z: vae.decoder(z, None))(vae, z / vae.config.scaling_factor)
    error = relative_error(whole, decode(vae, z))
    print(f"{error=:.2e}")
    assert error >= 1e-3


def lengths(chunks: list[slice]) -> list[int]:
    return [chunk.stop - chunk.start for chunk in chunks]


def test_chunks_cover_a_video():
    assert [lengths(frame_chunks(number)) for number in (1, 2, 3, 4, 5, 6)] == [[1], [2], [3], [2, 2], [3, 2], [2] * 3]
    assert [lengths(video_chunks(number)) for number in (1, 8, 9, 15, 17)] == [[1], [8], [9], [15], [9, 8]]
    for number in range(1, 40):
        for chunks in (frame_chunks(number), video_chunks(number)):
            assert [i for chunk in chunks for i in range(number)[chunk]] == list(range(number))
    with pytest.raises(ValueError, match="frames=0"):
        frame_chunks(0)


def test_refuses_other_chunks():
    vae = model("four_levels")
    for method, chunk, message in (
        ("decode_first", latents(4), "up to 3 latent frames, got 4"),
        ("decode_next", latents(1), "takes 2 latent frames, got 1"),
        ("encode_first", videos(16), "up to 15 frames, got 16"),
        ("encode_next", videos(9), "takes 8 frames, got 9"),
    ):
        first = {"decode": vae.decode_first, "encode": vae.encode_first}[method[:6]]
        cache = [jax.eval_shape(first, jnp.asarray(chunk[:, :1]))[1]] if method.endswith("next") else []
        with pytest.raises(ValueError, match=message):
            getattr(vae, method)(jnp.asarray(chunk), *cache)


def test_the_cache_can_be_donated():
    """Warnings are errors: every donated buffer is used, for the cache that comes back."""
    graph, params = nnx.split(model("four_levels"))
    following = jax.jit(lambda params, z, cache: nnx.merge(graph, params).decode_next(z, cache), donate_argnums=2)
    z = latents(5)
    frames, cache = Component(model("four_levels"))(z[:, :3], method="decode_first")
    compiled = following.lower(params, z[:, 3:], cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    donated = jax.tree.leaves(cache)
    more, cache = following(params, z[:, 3:], cache)
    assert all(leaf.is_deleted() for leaf in donated)
    np.testing.assert_array_equal(np.concatenate([frames, more], axis=1), decode(model("four_levels"), z))


def test_latents_are_scaled_in_float32():
    vae, rounded = model("four_levels"), jnp.asarray(latents(1), jnp.bfloat16)
    np.testing.assert_array_equal(decode(vae, rounded), decode(vae, rounded.astype(jnp.float32)))
    frames, _ = Component(model("four_levels", jnp.bfloat16))(rounded.astype(jnp.float16), method="decode_first")
    assert frames.dtype == jnp.bfloat16


def test_float32_asks_for_ieee_products():
    assert_highest_precision(lower_for_cuda(lambda vae, z: vae.decode_first(z), model("four_levels"), latents(3)))
    assert_highest_precision(lower_for_cuda(lambda vae, x: vae.encode_first(x), model("four_levels"), videos(9)))


def published(latent_frames: int, dtype: Any = jnp.bfloat16) -> tuple[nnx.GraphDef, nnx.State, Any]:
    """The published model and latents of 480 x 720, all abstract."""
    graph, state, _ = shapes_of(VideoAutoencoderConfig(), dtype)
    return graph, state, jax.ShapeDtypeStruct((1, latent_frames, 60, 90, 16), dtype)


def test_memory_at_480_x_720():
    """Nothing is larger than what the widest convolution sees at once, 4 of 8 frames, of 3 times 256 channels."""
    graph, params, z = published(2)
    frames, cache = jax.eval_shape(lambda params, z: nnx.merge(graph, params).decode_first(z), params, z)
    assert frames.shape == (1, 8, 480, 720, 3)
    assert round(sum(leaf.size * 2 for leaf in jax.tree.leaves(cache)) / 1e9, 2) == 2.81
    largest = largest_intermediate(lambda params, *args: nnx.merge(graph, params).decode_next(*args), params, z, cache)
    assert largest == 4 * 3 * 256 * 480 * 720 <= MAX_SEEN


@pytest.mark.parametrize("frames, together", [(6, 1), (6, 3), (5, 1)])
def test_a_convolution_of_some_frames_at_a_time(monkeypatch, frames, together):
    """It is that of all frames at once, which is torch's."""
    conv = CausalConv(4, 6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, frames, 5, 7, 4), np.float32))
    whole, carried = conv(x, None)
    padded = torch.from_numpy(np.array(x)[:, [0, 0, *range(frames)]].transpose(0, 4, 1, 2, 3))
    kernel = torch.from_numpy(np.array(conv.kernel[...]).transpose(4, 3, 0, 1, 2))
    expected = torch.nn.functional.conv3d(padded, kernel, padding=(0, 1, 1)).numpy().transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)

    monkeypatch.setattr(causal, "MAX_SEEN", 2 * 3 * 5 * 7 * 4 * together + 1)
    assert f"[{frames // together},2,{together},5,7,6]" in str(jax.make_jaxpr(lambda x: conv(x, None))(x))
    parts, again = conv(x, None)
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(again, carried)


def test_all_published_keys_are_known():
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLCogVideoX()
    tensors = tensors_of(vae)
    config = VIDEO_AUTOENCODER.config(dict(vae.config))
    assert config == VideoAutoencoderConfig()
    _, _, variables = shapes_of(config, jnp.bfloat16)
    shapes = {path: tuple(variable.shape) for path, variable in variables.items()}
    assert map_weights(tensors, VIDEO_AUTOENCODER.rules, shapes, "meta").keys() == shapes.keys()
    sizes = {path: variable.size for path, variable in variables.items()}
    decoder = sum(size for path, size in sizes.items() if path.startswith("decoder."))
    assert (decoder, sum(sizes.values()), len(tensors)) == (DECODER_PARAMETERS, PARAMETERS, KEYS)
    assert sum(sizes.values()) == sum(parameter.numel() for parameter in vae.parameters())


@pytest.mark.parametrize(
    "field, value",
    [
        ("act_fn", "relu"),
        ("norm_eps", 1e-5),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0] * 16),
        ("latents_std", [1.0] * 16),
        ("use_quant_conv", True),
        ("use_post_quant_conv", True),
        ("down_block_types", ["DownEncoderBlock2D"] * 4),
        ("up_block_types", ["CogVideoXUpBlock3D"] * 3),
        ("temporal_compression_ratio", 3),
        ("temporal_compression_ratio", 16),
        ("scaling_factor", 0.0),
        ("norm_num_groups", 48),
    ],
)
def test_refuses_other_architectures(field, value):
    json = {"_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [128, 256, 256, 512], "sample_height": 480}
    assert VideoAutoencoderConfig.from_json(json) == VideoAutoencoderConfig()
    with pytest.raises(ValueError, match=f"{field}="):
        VideoAutoencoderConfig.from_json(json | {field: value})
