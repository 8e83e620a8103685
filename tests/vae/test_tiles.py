"""Images and videos decoded in tiles, against diffusers' `enable_tiling`."""

import shutil

import numpy as np
import pytest
from damage import edit_json
from PIL import Image
from pipeline_cases import error, load_theirs, run_theirs

from dfa2_jax import Pipeline
from dfa2_jax.options import Options
from dfa2_jax.pipeline.ahead import compile_decoder
from dfa2_jax.pipeline.components import Component
from dfa2_jax.pipeline.decoding import frames_of, in_bytes
from dfa2_jax.pipeline.output import metadata
from dfa2_jax.pipeline.timing import Clock
from dfa2_jax.vae.image import AutoencoderConfig
from dfa2_jax.vae.video import VideoAutoencoderConfig


@pytest.fixture(scope="module")
def pipeline(tiny_cogvideox_5b, tmp_path_factory):
    """Tiles of 12 x 5 latents, 10 x 4 apart."""
    folder = tmp_path_factory.mktemp("tiles") / "model"
    shutil.copytree(tiny_cogvideox_5b, folder)
    edit_json(folder / "vae" / "config.json", sample_height=192, sample_width=80)
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def autoencoders():
    """diffusers' and ours, with tiles of 12 x 5 latents, 10 x 4 apart, whose 4 x 2 pixels are blended."""
    import diffusers
    from torch_models import redraw
    from video_models import loaded

    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 2, "up_block_types": ("CogVideoXUpBlock3D",) * 2}
    sizes = {"block_out_channels": (4, 4), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
    sizes |= {"temporal_compression_ratio": 2, "scaling_factor": 0.7, "sample_height": 48, "sample_width": 20}
    theirs = redraw(diffusers.AutoencoderKLCogVideoX(**blocks, **sizes), 0.3)
    return theirs, Component(loaded(theirs)), VideoAutoencoderConfig.from_json(dict(theirs.config)).tiles()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("frames", "height", "width", "count"),
    [(3, 11, 9, 6), (5, 1, 9, 3), (3, 1, 5, 1)],  # of few sizes: each is compiled
    ids=["both ways", "a row, two chunks", "one tile"],
)
def test_tiles_equal_diffusers(frames, height, width, count, autoencoders):
    """An edge of one latent is 2 pixels high, less than the 4 that are blended elsewhere."""
    import torch

    reference, vae, tiles = autoencoders
    latents = np.random.default_rng(0).standard_normal((frames, height, width, 4)).astype(np.float32)
    channels_first = torch.tensor(latents).permute(3, 0, 1, 2)[None] / reference.config.scaling_factor
    reference.enable_tiling()
    with torch.no_grad():
        theirs = reference.decode(channels_first).sample
        reference.use_tiling = False
        whole = reference.decode(channels_first).sample
    theirs, whole = (np.clip(x[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5, 0, 1) for x in (theirs, whole))
    decoded = []
    chunks = list(frames_of(vae, latents, np.asarray, tiles, decoded.append))
    assert decoded == ([5, 4] if frames == 5 else [5]) * count
    assert [len(chunk) for chunk in chunks] == decoded[: len(chunks)]
    ours = np.concatenate(chunks)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 2e-5
    assert ours.std() > 0.05, "the video is flat: the comparison shows nothing"
    difference = np.abs(theirs - whole).max()
    assert difference == 0 if count == 1 else difference > 0.05, "tiling is idle"


CALL = {"prompt": "a red ring", "height": 32, "width": 80, "num_frames": 9, "num_inference_steps": 2}
"""Tiles of 5, 5 and 2 latents side by side."""


def test_tiles_of_one_size_share_a_program_that_is_compiled_ahead(pipeline, monkeypatch, capsys):
    compiled, compile, seen = [], Component.compile, []

    def watched(self, x, *args, **options):
        compiled.append(x.shape)
        return compile(self, x, *args, **options)

    monkeypatch.setattr(Component, "compile", watched)
    watch = {"callback_on_frames": lambda pipeline, *told: seen.append(told[:2]), "output_type": "np"}
    call = pipeline.prepare(Options(**CALL, **watch, vae_tiling=True))
    compile_decoder(call)
    assert compiled == [(1, 3, 4, 5, 4), (1, 3, 4, 2, 4)]
    clock = Clock()
    frames = call.images(call.tokens)
    clock.lap("decode")
    assert clock.seconds["compile"] == 0
    assert frames.shape == (1, 9, 32, 80, 3) and seen == [(0, 0)]
    assert "decode 3 tiles: 100%" in (said := capsys.readouterr().err) and "27/27" in said
    assert metadata(pipeline, call.options, call.request)["vae_tiling"] is True


@pytest.mark.torch
@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_dev"])
def test_tiles_of_images_equal_diffusers(name, request, tmp_path):
    """Tiles of 64 pixels, 48 apart; the last are 16 and 32 wide. So are those of a picture that is encoded."""
    from diffusers import AutoPipelineForImage2Image

    shutil.copytree(request.getfixturevalue(name), tmp_path / "model")
    edit_json(tmp_path / "model/vae/config.json", sample_size=64)
    ours, theirs = Pipeline.from_pretrained(tmp_path / "model"), load_theirs(tmp_path / "model")
    call = {"prompt": "a", "height": 112, "width": 128, "num_inference_steps": 2, "guidance_scale": 1.0}
    call |= {"max_sequence_length": 16, "output_type": "np"}
    whole, tiled = (ours(**call, vae_tiling=tiling, progress=False).images for tiling in (False, True))
    theirs.vae.enable_tiling()
    assert np.abs(tiled - run_theirs(theirs, 0, **call)).max() <= 1 / 255
    assert np.abs(tiled - whole).max() > 0.02, "tiling is idle"
    tiled = in_bytes(tiled)
    call |= {"image": tiled[0], "strength": 0.5, "num_inference_steps": 4, "output_type": "latent"}
    encoded, whole = (ours(**call, vae_tiling=tiling, progress=False).images for tiling in (True, False))
    theirs = AutoPipelineForImage2Image.from_pipe(theirs)
    theirs.set_progress_bar_config(disable=True)
    assert error(encoded, run_theirs(theirs, 0, **call | {"image": Image.fromarray(tiled[0])})) < 1e-4
    assert error(encoded, whole) > 1e-3, "tiling is idle"


def test_tiles_of_published_images():
    """Tiles of 1024 px, 768 apart, 256 of them blended."""
    sizes = {"block_out_channels": [128, 256, 512, 512], "sample_size": 1024}
    axis = AutoencoderConfig.from_json(sizes).tiles().rows
    assert (axis.size, axis.step, axis.blended) == (128, 96, 256)
    assert AutoencoderConfig.from_json(sizes | {"sample_size": [1024, 768]}).sample_size == 1024


def test_tiles_of_published_videos():
    """720 x 480: tiles of 30 x 45 latents, 25 x 36 apart, as diffusers' comments on overlap have it."""
    tiles = VideoAutoencoderConfig().tiles()
    assert (tiles.rows.size, tiles.rows.step, tiles.rows.blended) == (30, 25, 40)
    assert (tiles.columns.size, tiles.columns.step, tiles.columns.blended) == (45, 36, 72)
    ends = [(y.start, y.stop, x.start, x.stop) for y, x in tiles.parts(60, 90)]
    assert len(ends) == 9 and ends[0] == (0, 30, 0, 45) and ends[-1] == (50, 60, 72, 90)
    assert tiles.parts(30, 45) == [(slice(0, 30), slice(0, 45))]


def test_tiles_that_do_not_meet_are_refused(pipeline, monkeypatch):
    with pytest.raises(ValueError, match="half of the VAE's sample_height=64 .* do not meet at a multiple of 8 pixels"):
        VideoAutoencoderConfig(sample_height=64).tiles()
    with pytest.raises(ValueError, match="tiles of the VAE's sample_size=24 .* do not meet at a multiple of 8 pixels"):
        AutoencoderConfig(block_out_channels=(32,) * 4, sample_size=24).tiles()
    monkeypatch.setattr(pipeline.networks, "config", lambda name: VideoAutoencoderConfig(sample_width=64))
    with pytest.raises(ValueError, match="vae_tiling: tiles of half of the VAE's sample_width=64"):
        pipeline.request(Options(**CALL, vae_tiling=True))
