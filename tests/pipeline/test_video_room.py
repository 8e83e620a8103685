"""Videos whose memory a device lacks are refused before a step runs."""

import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dfa2_jax import Plan
from dfa2_jax.options import Options
from dfa2_jax.pipeline import ahead
from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.components import Component

CALL = {"prompt": "a red ring", "height": 32, "width": 48, "num_frames": 17, "num_inference_steps": 5}


@pytest.fixture
def pipeline(pipelines, monkeypatch):
    monkeypatch.setattr(Call, "run", lambda call: pytest.fail("a step was run"))
    return pipelines("tiny_cogvideox_5b")


@pytest.fixture
def has_room(monkeypatch):
    """Says how many bytes the device has free, and if not None, how many the decoder needs."""

    def patch(free, need=None):
        monkeypatch.setattr(ahead, "counted_bytes", lambda devices: free)
        if need is not None:
            monkeypatch.setattr(ahead, "compile_chunks", lambda *_: need)

    return patch


def test_a_decoder_needs_what_its_largest_program_takes(pipeline, has_room, monkeypatch):
    call, programs, compile = pipeline.prepare(Options(**CALL)), [], Component.compile

    def watched(*args, **options):
        programs.append(compile(*args, **options))
        return programs[-1]

    monkeypatch.setattr(Component, "compile", watched)
    ahead.check_decoder(call)
    assert not programs, "a CPU counts no memory"
    ahead.compile_decoder(call)
    assert len(programs) == 2
    assert programs[0].nbytes != programs[1].nbytes
    need = max(program.nbytes for program in programs)
    has_room(need)
    ahead.check_decoder(call)
    has_room(need - 1)
    for check in (ahead.check_decoder, ahead.compile_ahead):
        with pytest.raises(MemoryError, match=r"The VAE takes 0\.0 GB to decode a video of 17 frames of 32 x 48 px"):
            check(call)


def test_what_is_given_away_lies_in_what_is_returned(pipeline, monkeypatch):
    """Weights are on the device already, and the frames carried over become those that are carried on."""
    sizes = {"argument": 1000, "temp": 100, "output": 20, "alias": 10}
    analysis = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: analysis)
    z = np.zeros((1, 3, 4, 6, 4), np.float32)
    assert pipeline.networks["vae"].compile(z, method="decode_first").nbytes == 120


@pytest.mark.parametrize(
    ("free", "arguments", "said"),
    [
        (30e9, {}, "40.0 GB to decode .* 576 x 1152 px, and 30.0 GB are free: vae_tiling=True takes about 5.2 GB"),
        (5e9, {}, "5.0 GB are free: about 192 x 400 px would fit"),
        (30e9, {"vae_tiling": True}, "30.0 GB are free: about 192 x 304 px would fit"),
        (1e3, {}, "0.0 GB are free: take a device with more memory"),
    ],
    ids=["tiles fit", "tiles do not", "with tiles", "nothing fits"],
)
@pytest.mark.parametrize("progress", [False, True], ids=["no bar", "a bar"])
def test_a_refusal_says_what_would_fit(progress, free, arguments, said, pipeline, has_room):
    """Tiles are of 240 x 360 pixels."""
    has_room(int(free), int(40e9))
    with pytest.raises(MemoryError, match=said):
        pipeline(**CALL | {"height": 576, "width": 1152, "num_frames": 1}, **arguments, progress=progress)


def test_an_autoencoder_may_take_tiles_itself(pipelines, has_room, monkeypatch, caplog):
    """HunyuanVideo's does. It says so, and the metadata say what was done."""
    pipeline, arguments = pipelines("tiny_hunyuanvideo"), CALL | {"num_frames": 1, "num_inference_steps": 1}
    monkeypatch.setattr(ahead, "compile_chunks", lambda *given: int(40e9 if given[-1] is None else 5e9))
    has_room(int(5e9))
    for progress in (False, True):
        caplog.clear()
        output = pipeline(**arguments, progress=progress)
        assert output.metadata["vae_tiling"] is True
        assert "takes 40.0 GB" in caplog.text and "as with vae_tiling=True, which take 5.0 GB" in caplog.text
    has_room(int(4.9e9))
    with pytest.raises(MemoryError, match="takes 40.0 GB .* 4.9 GB are free: about 16 x 32 px would fit"):
        pipeline(**arguments, progress=False)
    has_room(int(40e9))
    assert not pipeline(**arguments, progress=False).metadata["vae_tiling"]


def test_latents_need_no_decoder(pipeline, has_room):
    has_room(0, int(40e9))
    ahead.check_decoder(pipeline.prepare(Options(**CALL, output_type="latent")))


def test_images_are_refused_too(pipelines, has_room):
    has_room(int(10e9), int(40e9))
    with pytest.raises(MemoryError, match="The VAE takes 40.0 GB to decode an image of 64 x 64 px.*about 32 x 32 px"):
        pipelines("tiny_sd35")("", height=64, width=64, num_inference_steps=1, progress=False)


def test_what_attention_keeps_of_all_frames_is_counted(pipelines, monkeypatch):
    """Three layers, two sides of guidance, 14 tokens of text and 6 of each latent frame, 4 heads of 16 numbers."""
    pipeline = pipelines("tiny_cogvideox_5b")
    for frames, latent_frames in ((9, 3), (17, 5)):
        arguments = CALL | {"num_frames": frames}
        plan = Plan.full(pipeline.setting(**arguments)).with_method(1, 0, 0, "cached")
        call, size = pipeline.prepare(Options(**arguments, plan=plan)), 3 * 2 * (14 + 6 * latent_frames) * 4 * 16 * 4
        monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices, size=size: size)
        call.program(plan)
        monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices, size=size: size - 1)
        with pytest.raises(MemoryError, match=f"images of {14 + 6 * latent_frames} tokens.*fewer frames of a video"):
            call.run()
        with pytest.raises(MemoryError):
            ahead.compile_ahead(call)


def test_text_encoders_make_room_before_anything_is_refused(pipelines, has_room, monkeypatch, caplog):
    """What they leave is what attention, or the decoder, lacked. The next call reads them again."""
    pipeline, arguments = pipelines("tiny_cogvideox_5b"), CALL | {"num_inference_steps": 1, "progress": False}
    plan = Plan.full(pipeline.setting(**arguments)).with_method(slice(1, None), 0, 0, "cached")
    loaded = pipeline.networks._loaded

    def free(devices=()):
        return 0 if "text_encoder" in loaded else sys.maxsize

    want = pipeline(**arguments, plan=plan, output_type="np").frames
    assert "text_encoder" in loaded
    monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", free)
    got = pipeline(**arguments, plan=plan, output_type="np").frames
    assert "text_encoder made room" in caplog.text and "text_encoder" not in loaded
    np.testing.assert_array_equal(got, want)

    caplog.clear()
    monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices: sys.maxsize)
    monkeypatch.setattr(ahead, "counted_bytes", free)
    np.testing.assert_array_equal(pipeline(**arguments, plan=plan, output_type="np").frames, want)
    assert "text_encoder made room" in caplog.text
