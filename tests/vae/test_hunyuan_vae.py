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
from dfa2_jax.pipeline.decoding import compile_chunks, frames_of
from dfa2_jax.vae import causal
from dfa2_jax.vae.hunyuan import HunyuanAutoencoderConfig
from dfa2_jax.vae.hunyuan_blocks import EdgeConv, frame_causal_attention
from dfa2_jax.vae.spec import HUNYUAN_AUTOENCODER
from dfa2_jax.vae.tiles import Axis, Tiles
from dfa2_jax.weights.rules import map_weights

SIZES = {"block_out_channels": (4, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
BLOCKS = {"up_block_types": ("HunyuanVideoUpBlock3D",) * 3, "down_block_types": ("HunyuanVideoDownBlock3D",) * 3}
DECODER_PARAMETERS, PARAMETERS, KEYS = 146_136_339, 246_478_803, 248  # of the published model


@cache
def reference() -> torch.nn.Module:
    return redraw(diffusers.AutoencoderKLHunyuanVideo(spatial_compression_ratio=4, **SIZES, **BLOCKS), 0.1)


@cache
def component(dtype: Any = jnp.float32) -> Component:
    return Component(loaded(reference(), dtype, HUNYUAN_AUTOENCODER))


def latents(frames: int, height: int = 3, width: int = 5) -> np.ndarray:
    """A video, not square."""
    return np.random.default_rng(frames).standard_normal((frames, height, width, 4)).astype(np.float32)


def diffusers_decode(vae: Any, z: np.ndarray) -> np.ndarray:
    """As pipeline_hunyuan_video calls it, and as it makes frames of what it gets."""
    channels_first = torch.tensor(z).permute(3, 0, 1, 2)[None].to(vae.dtype)
    with torch.no_grad():
        (frames,) = vae.decode(channels_first / vae.config.scaling_factor).sample.float()
    return np.clip(frames.permute(1, 2, 3, 0).numpy() / 2 + 0.5, 0, 1)


def decode(vae: Component, z: np.ndarray, tiles: Tiles | None = None) -> np.ndarray:
    return np.concatenate(list(frames_of(vae, z, np.asarray, tiles)))


@pytest.mark.parametrize("latent_frames", [1, 5, 7, 9])
def test_equals_diffusers(latent_frames):
    """A frame; a window and one of two frames; windows of which the last would have no frame of its own, and of three.

    Seven latent frames end where a window ends, nine in the middle of one.
    """
    z = latents(latent_frames)
    ours = decode(component(), z)
    error = relative_error(ours, diffusers_decode(reference(), z))
    print(f"{latent_frames=} {ours.shape=} {error=:.2e}")
    assert error <= 1e-5 and ours.std() > 0.05
    assert len(ours) == 4 * latent_frames - 3 == component().config.num_frames(latent_frames)


def test_one_window_is_one_call():
    z = latents(4)
    whole = np.asarray(component()(z[None], method="decode"))[0]
    np.testing.assert_array_equal(decode(component(), z), np.clip(whole / 2 + 0.5, 0, 1))
    with pytest.raises(ValueError, match="up to 5 latent frames, got 6"):
        component()(latents(6)[None], method="decode")


TILES = Tiles(Axis(3, 2, 4), Axis(5, 3, 8), 4)


def tiled_reference() -> torch.nn.Module:
    """diffusers' with `TILES`."""
    vae = deepcopy(reference())
    vae.enable_tiling(
        tile_sample_min_height=12,
        tile_sample_min_width=20,
        tile_sample_stride_height=8,
        tile_sample_stride_width=12,
    )
    return vae


def test_tiles_of_windows_equal_diffusers():
    """Two rows and three columns of tiles; the last row, and the last column, are no more than what is blended."""
    z, told = latents(5, 3, 8), []
    ours = list(frames_of(component(), z, np.asarray, TILES, told.append))
    assert [len(frames) for frames in ours] == [13, 4], "frames are handed out window by window"
    assert told == [13] * 6 + [4] * 6
    theirs = diffusers_decode(tiled_reference(), z)
    error = relative_error(np.concatenate(ours), theirs)
    print(f"{error=:.2e}")
    assert error <= 1e-5
    assert relative_error(theirs, diffusers_decode(reference(), z)) > 1e-2, "tiling is idle"


def test_a_video_of_one_tile_is_not_cut():
    z = latents(4)
    np.testing.assert_array_equal(decode(component(), z, TILES), decode(component(), z))


def test_published_tiles():
    """As diffusers has them, which come to 308 of eight sizes at 720p."""
    config, theirs = HunyuanAutoencoderConfig(), diffusers.AutoencoderKLHunyuanVideo(**SIZES, **BLOCKS)
    tiles = config.tiles()
    for axis, way in ((tiles.rows, "height"), (tiles.columns, "width")):
        tile, stride = (getattr(theirs, f"tile_sample_{name}_{way}") for name in ("min", "stride"))
        assert (axis.size * 8, axis.step * 8, axis.blended) == (tile, stride, tile - stride)
    parts, chunks = tiles.parts(90, 160), config.chunks(33)
    assert len(parts) * len(chunks) == 308
    sizes = {(y.stop - y.start, x.stop - x.start, len(range(33)[chunk.latents])) for y, x in parts for chunk in chunks}
    assert len(sizes) == 8


@pytest.mark.parametrize("latent_frames", range(1, 40))
def test_windows_cover_a_video(latent_frames):
    """A window has as many frames beyond its own as the next one blends."""
    config = HunyuanAutoencoderConfig()
    chunks = config.chunks(latent_frames)
    assert sum(chunk.num_frames for chunk in chunks) == config.num_frames(latent_frames)
    made = [config.num_frames(len(range(latent_frames)[chunk.latents])) - chunk.dropped for chunk in chunks]
    assert [size - chunk.num_frames for size, chunk in zip(made, chunks, strict=True)][:-1] == [4] * (len(chunks) - 1)
    assert all(chunk.num_frames > 0 for chunk in chunks) and made[-1] == chunks[-1].num_frames


def test_no_video_without_frames():
    with pytest.raises(ValueError, match="latent_frames=0"):
        HunyuanAutoencoderConfig().chunks(0)


def test_compiles_a_program_of_each_size(monkeypatch):
    """Windows here have two sizes: the first and the second share a program."""
    compiled, compile = [], Component.compile

    def watched(self, z, **options):
        compiled.append((z.shape, compile(self, z, **options)))
        return compiled[-1][1]

    monkeypatch.setattr(Component, "compile", watched)
    z = latents(9)
    need = compile_chunks(component(), z, np.asarray)
    assert [shape for shape, _ in compiled] == [(1, 5, 3, 5, 4), (1, 3, 3, 5, 4)]
    assert need == max(program.nbytes for _, program in compiled) > 33 * 3 * 4 * 5 * 4


def test_a_window_is_decoded_when_its_frames_are_asked_for(monkeypatch):
    calls, call = [], Component.__call__

    def watched(self, z, **options):
        calls.append(z.shape[1])
        return call(self, z, **options)

    monkeypatch.setattr(Component, "__call__", watched)
    frames = frames_of(component(), latents(9), np.asarray)
    assert not calls
    assert len(next(frames)) == 13 and calls == [5]
    assert len(next(frames)) == 12 and calls == [5, 5]
    frames.close()
    assert calls == [5, 5]


def test_bfloat16_is_as_near_as_torch():
    z = latents(2)
    exact, rounded = diffusers_decode(reference(), z), diffusers_decode(deepcopy(reference()).to(torch.bfloat16), z)
    error, torch_error = relative_error(decode(component(jnp.bfloat16), z), exact), relative_error(rounded, exact)
    print(f"{error=:.2e} {torch_error=:.2e}")
    assert error <= 1.5 * torch_error


@pytest.mark.parametrize("max_scores", [1, 200, 2**26])
def test_chunks_equal_masked_attention(max_scores):
    """Chunks of one query, of some with a ragged end, and all queries of a frame at once."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 3, 10, 8)).astype(np.float32)
    frame = torch.arange(3).repeat_interleave(10)
    flat = (torch.tensor(x).reshape(2, 30, 8).double() for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=frame[:, None] >= frame[None])
    ours = jax.jit(lambda *qkv: frame_causal_attention(*qkv, max_scores=max_scores))(q, k, v)
    assert relative_error(ours.reshape(2, 30, 8), dense) <= 1e-6


@pytest.mark.parametrize("together", [1, 3])
def test_a_convolution_of_some_frames_at_a_time(monkeypatch, together):
    """It is that of all frames at once, which is torch's with its edges repeated."""
    conv = EdgeConv(4, 6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 7, 4)).astype(np.float32)
    padding = (1, 1, 1, 1, 2, 0)
    padded = torch.nn.functional.pad(torch.from_numpy(x).permute(0, 4, 1, 2, 3), padding, mode="replicate")
    kernel = torch.from_numpy(np.array(conv.kernel[...]).transpose(4, 3, 0, 1, 2))
    expected = torch.nn.functional.conv3d(padded, kernel).numpy().transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(causal, "MAX_SEEN", 2 * 3 * 5 * 7 * 4 * together + 1)
    assert f"[{6 // together},2,{together},5,7,6]" in str(jax.make_jaxpr(conv)(jnp.asarray(x)))
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_float32_asks_for_ieee_products():
    vae = component()
    run = lambda params, z: nnx.merge(vae.graph, params).decode(z)  # noqa: E731
    assert_highest_precision(lower_for_cuda(run, vae.params, latents(2)[None]))


def test_memory_at_720_x_1280():
    """Nothing of a window is larger than its frames in their widest form; all scores would be 1.2 times that."""
    graph, params, _ = shapes_of(HunyuanAutoencoderConfig(), jnp.bfloat16, HUNYUAN_AUTOENCODER)
    z = jax.ShapeDtypeStruct((1, 5, 90, 160, 16), jnp.bfloat16)
    largest = largest_intermediate(lambda params, z: nnx.merge(graph, params).decode(z), params, z)
    assert largest == 19 * 256 * 720 * 1280  # with the two that stand before them
    q = jax.ShapeDtypeStruct((1, 5, 90 * 160, 512), jnp.bfloat16)
    assert largest_intermediate(frame_causal_attention, q, q, q) <= 2**26 + 5 * 90 * 160


def test_all_published_keys_are_known():
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLHunyuanVideo()
    tensors, config = tensors_of(vae), HUNYUAN_AUTOENCODER.config(dict(vae.config))
    assert config == HunyuanAutoencoderConfig()
    _, _, variables = shapes_of(config, jnp.bfloat16, HUNYUAN_AUTOENCODER)
    shapes = {path: tuple(variable.shape) for path, variable in variables.items()}
    assert map_weights(tensors, HUNYUAN_AUTOENCODER.rules, shapes, "meta").keys() == shapes.keys()
    sizes = {name: parameter.numel() for name, parameter in vae.named_parameters()}
    decoder = sum(size for name, size in sizes.items() if name.startswith(("decoder.", "post_quant_conv.")))
    assert decoder == sum(variable.size for variable in variables.values())
    assert (decoder, sum(sizes.values()), len(tensors)) == (DECODER_PARAMETERS, PARAMETERS, KEYS)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("act_fn", "relu", "'silu'"),
        ("mid_block_add_attention", False, "True"),
        ("temporal_compression_ratio", 8, "4"),
        ("up_block_types", ["HunyuanVideoUpBlock3D"] * 3, r"\['HunyuanVideoUpBlock3D'"),
        ("spatial_compression_ratio", 16, "8"),
        ("scaling_factor", 0.0, "positive"),
        ("norm_num_groups", 48, "multiples"),
        ("block_out_channels", [128, 128], "from 3 to 7"),
        ("layers_per_block", 100, "from 1 to 99"),
    ],
)
def test_refuses_other_architectures(field, value, wanted):
    json = {"_class_name": "AutoencoderKLHunyuanVideo", "block_out_channels": [128, 256, 512, 512], "in_channels": 3}
    assert HunyuanAutoencoderConfig.from_json(json) == HunyuanAutoencoderConfig()
    with pytest.raises(ValueError, match=wanted) as refused:
        HunyuanAutoencoderConfig.from_json(json | {field: value})
    assert f"{field}={value!r}" in str(refused.value).replace("self.", "") or field == "block_out_channels"
