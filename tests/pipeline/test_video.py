"""Videos of whole pipelines: against diffusers, by plans, chunk by chunk, and what calls are refused."""

import json
import logging
from functools import cache

import numpy as np
import pytest
from damage import copy_model, edit_json, refuses
from PIL import Image, ImageSequence, features
from pipeline_cases import PROMPTS, check_planned, error, load_theirs, run_theirs

from dfa2_jax import Pipeline, Plan, PlanError
from dfa2_jax.io.images import read_metadata
from dfa2_jax.options import Options
from dfa2_jax.pipeline.components import Component

SIZE = {"height": 32, "width": 48}
DPM = "CogVideoXDPMScheduler"
DYNAMIC = {"scheduler": DPM, "use_dynamic_cfg": True}
ODD, EVEN = {"num_frames": 9}, {"num_frames": 13}
"""Frames of three and of four latent ones."""
OTHERS = {
    "negative_prompt": "blurry",
    "seed": [3, 4],
    "prompt": PROMPTS,
}
CASES = {
    "2b": ("tiny_cogvideox_2b", ODD | {"num_inference_steps": 6, "negative_prompt": "blurry"}, "frames"),
    "2b, 7 steps": ("tiny_cogvideox_2b", ODD | {"num_inference_steps": 7}, "latents"),
    "2b, dpm": ("tiny_cogvideox_2b", ODD | DYNAMIC | {"num_inference_steps": 6}, "latents"),
    "5b, even": ("tiny_cogvideox_5b", EVEN | {"num_inference_steps": 6}, "frames"),
    "5b, 7 steps, dynamic": (
        "tiny_cogvideox_5b", EVEN | {"num_inference_steps": 7, "use_dynamic_cfg": True}, "latents",
    ),
    "5b, dpm, two prompts": ("tiny_cogvideox_5b", ODD | DYNAMIC | OTHERS | {"num_inference_steps": 7}, "frames"),
    "5b, no guidance": ("tiny_cogvideox_5b", ODD | {"num_inference_steps": 6, "guidance_scale": 1.0}, "latents"),
    "1.5, padding": ("tiny_cogvideox_15", ODD | {"num_inference_steps": 6}, "frames"),
    "1.5, 7 steps": ("tiny_cogvideox_15", ODD | {"num_inference_steps": 7}, "latents"),
    "1.5, dpm, even": ("tiny_cogvideox_15", EVEN | DYNAMIC | {"num_inference_steps": 6}, "latents"),
}  # fmt: skip
LONG_CASES = {
    f"{name}, {steps} steps{', dpm' * dpm}": (
        f"tiny_cogvideox_{name}", ODD | (DYNAMIC if dpm else {}) | {"num_inference_steps": steps}, "latents",
    )
    for name in ("2b", "5b", "15")
    for steps, dpm in ((28, False), (50, True))
}  # fmt: skip
"""Folder, arguments, and what is compared: latents, or decoded frames, too."""


@pytest.fixture(scope="module")
def theirs(request):
    """By the fixture of a folder: diffusers' pipeline in float32."""
    return cache(lambda name: load_theirs(request.getfixturevalue(name)))


def diffusers_arguments(pipeline, arguments):
    """Those of the same call, and its scheduler, as model cards take another."""
    import diffusers

    arguments = {"max_sequence_length": 14} | arguments
    name = arguments.pop("scheduler", "CogVideoXDDIMScheduler")
    config = pipeline.scheduler.config
    pipeline.scheduler = getattr(diffusers, name).from_config(config, timestep_spacing="trailing")
    return arguments


def diffusers_frames(pipeline, latents, dropped):
    """[B, F, H, W, 3] in [0, 1] of its latents, without the first ones that only fill up."""
    import torch

    with torch.no_grad():
        video = pipeline.decode_latents(torch.tensor(latents)[:, dropped:])
    return pipeline.video_processor.postprocess_video(video, output_type="np")


@pytest.mark.torch
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in LONG_CASES)])
def test_latents_and_frames_equal_diffusers(case, pipelines, theirs):
    name, arguments, compared = (CASES | LONG_CASES)[case]
    arguments = {"prompt": PROMPTS[0], "seed": 7} | SIZE | arguments
    ours, reference = pipelines(name), theirs(name)
    latents = ours(**arguments, output_type="latent", progress=False)
    want = run_theirs(reference, **diffusers_arguments(reference, arguments), output_type="latent")
    assert latents.images is None and latents.frames.shape == want.shape and latents.frames.dtype == np.float32
    assert error(latents.frames, want) < 1e-4
    dropped = want.shape[1] - (arguments["num_frames"] + 3) // 4
    assert dropped == (name == "tiny_cogvideox_15" and arguments["num_frames"] == 9)
    if compared == "latents":
        return

    output = ours(**arguments, output_type="np", progress=False)
    frames = diffusers_frames(reference, want, dropped)
    assert output.images is None and output.frames.shape == frames.shape and output.frames.dtype == np.float32
    assert output.frames.shape[1] == {9: 9, 13: 16}[arguments["num_frames"]]
    assert np.abs(output.frames - frames).max() <= 1 / 255
    assert output.frames.std() > 0.05, "the video is flat: the comparison shows nothing"


def test_given_latents_start_the_call(pipelines):
    ours = pipelines("tiny_cogvideox_5b")
    arguments = ODD | SIZE | {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "latent"}
    arguments |= {"prompt": PROMPTS[0], "progress": False}
    from dfa2_jax.sampling.noise import BatchNoise

    noise = BatchNoise(4, 1, (3, 4, 4, 6)).draw()
    given = ours(**arguments, latents=noise)
    assert given.seeds == [None]
    np.testing.assert_array_equal(given.frames, ours(**arguments, seed=4).frames)
    with pytest.raises(ValueError, match=r"latents have shape \[1, 4, 3, 4, 6\], but .* need \['batch', 3, 4, 4, 6\]"):
        ours(**arguments, latents=noise.swapaxes(1, 2))


@pytest.mark.torch
@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 21), marks=pytest.mark.long)], ids=["one", "twenty"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("tiny_cogvideox_5b", ODD | {"num_inference_steps": 6}), ("tiny_cogvideox_15", EVEN | DYNAMIC)],
    ids=["5b", "1.5, dpm"],
)
def test_a_planned_call_equals_diffusers_with_masks(name, arguments, seeds, pipelines, request):
    ours, reference = pipelines(name), load_theirs(request.getfixturevalue(name))  # whose processors change
    arguments = {"prompt": PROMPTS[0], "num_inference_steps": 6, "seed": 7} | SIZE | arguments
    check_planned(ours, reference, arguments, diffusers_arguments(reference, arguments), seeds)


def test_a_plan_of_another_number_of_frames_is_refused(pipelines):
    """CogVideoX 1.5 makes as many tokens of 9 frames as of 13."""
    ours = pipelines("tiny_cogvideox_15")
    arguments = {"prompt": PROMPTS[0], "num_inference_steps": 6} | SIZE
    plan = Plan.full(ours.setting(**arguments, **ODD)).with_method(1, 0, 0, "cached")
    assert plan.setting.num_frames == 9
    with pytest.raises(PlanError, match="num_frames is 9 in the plan and 13 in the call"):
        ours(**arguments, **EVEN, plan=plan, progress=False)
    assert ours.request(Options(prompt="", plan=plan)).num_frames == 9


def test_a_callback_sees_latents_as_diffusers_has_them(pipelines):
    ours, seen = pipelines("tiny_cogvideox_15"), []
    arguments = {"prompt": PROMPTS[0], "num_inference_steps": 6, "output_type": "latent", "progress": False}
    arguments |= SIZE | ODD

    def watch(pipeline, step, timestep, values):
        seen.append((step, timestep, values["latents"].shape))
        last.append(values["latents"])

    last = []
    output = ours(**arguments, callback_on_step_end=watch)
    assert [shape for *_, shape in seen] == [(1, 4, 4, 4, 6)] * 6 and [step for step, *_ in seen] == [*range(6)]
    assert [time for _, time, _ in seen] == [999, 832, 666, 499, 332, 166]
    np.testing.assert_array_equal(last[-1], output.frames)
    np.testing.assert_array_equal(ours(**arguments).frames, output.frames)


def test_thirteen_frames_come_out_as_sixteen_and_a_warning_says_so(pipelines, caplog):
    ours = pipelines("tiny_cogvideox_2b")
    with caplog.at_level(logging.WARNING, "dfa2_jax"):
        ours.prepare(Options(prompt="", num_frames=9, num_inference_steps=5))
        assert not caplog.messages
        ours.prepare(Options(prompt="", num_frames=13, num_inference_steps=5))
    (said,) = caplog.messages
    assert "num_frames=13 are 4 latent frames" in said and "makes 16 frames of; 9 or 17 stay as many" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 10}, "num_frames=10 must be 1 more than a multiple of 4: try 9 or 13"),
        ({"num_frames": 3}, "num_frames=3 must be 1 more than a multiple of 4: try 1 or 5"),
        ({"num_frames": 0}, "num_frames=0 must be"),
        ({"num_frames": 10_001}, "num_frames=10001 exceeds 10000"),
        ({"fps": 0}, "fps=0 must be"),
        ({"height": 56}, "height x width = 56 x 80 must be multiples of 16: try 48 x 80"),
        ({"max_sequence_length": 13}, "max_sequence_length=13 must be 14, which CogVideoX was trained on"),
        ({"clip_skip": 1}, "clip_skip=1 is for SD3 only"),
        ({"skip_guidance_layers": [1]}, "skip_guidance_layers=.* is for SD3 only"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale=2.0 is FLUX's second forward"),
        ({"scheduler": "DPMSolverMultistepScheduler"}, "'DPMSolverMultistepScheduler'.*CogVideoXDDIMScheduler"),
        ({"prompt_2": "a"}, "prompt_2 is not None, but this model has 1 text encoders"),
        ({"pooled_prompt_embeds": np.zeros((1, 8)), "prompt": None}, "this model takes no pooled text"),
    ],
    ids=str,
)
def test_a_call_that_no_video_can_be_is_refused(arguments, message, pipelines):
    with pytest.raises(ValueError, match=message):
        pipelines("tiny_cogvideox_2b").request(Options(**{"prompt": ""} | arguments))


def test_sigmas_are_refused(pipelines):
    with pytest.raises(ValueError, match=r"sigmas=\[1.0, 0.5\]: CogVideoXDDIMScheduler makes its own"):
        pipelines("tiny_cogvideox_2b")("", **SIZE, **ODD, sigmas=[1.0, 0.5], progress=False)


def test_a_video_larger_than_15_has_positions_is_refused(pipelines):
    with pytest.raises(ValueError, match="4 x 5 tokens exceed the model's 3 x 5"):
        pipelines("tiny_cogvideox_15").request(Options(prompt="", height=64, width=80))


@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_schnell"])
@pytest.mark.parametrize("arguments", [{"num_frames": 9}, {"fps": 8}, {"use_dynamic_cfg": True}], ids=str)
def test_an_image_model_makes_no_video(name, arguments, pipelines):
    (argument,) = arguments
    with pytest.raises(ValueError, match=rf"{argument}.*video models: this one makes images"):
        pipelines(name).request(Options(prompt="", **arguments))


def test_image_to_video_is_refused_by_name(tiny_cogvideox_5b, tmp_path):
    folder = copy_model(tiny_cogvideox_5b, tmp_path)
    edit_json(folder / "model_index.json", _class_name="CogVideoXImageToVideoPipeline")
    with refuses(folder, "CogVideoXImageToVideoPipeline"):
        Pipeline.from_pretrained(folder)


def latents_of(frames):
    """[B, C, F, h, w]"""
    return np.random.default_rng(0).standard_normal((1, 4, frames, 4, 6)).astype(np.float32)


def test_frames_are_decoded_chunk_by_chunk(pipelines, monkeypatch, capsys):
    ours, chunks, carry = pipelines("tiny_cogvideox_5b"), [], Component.carry

    def watched(self, x, carried, *, method):
        chunks.append((x.shape, method))
        return carry(self, x, carried, method=method)

    monkeypatch.setattr(Component, "carry", watched)
    assert ours.decode(latents_of(3)).shape == (1, 9, 32, 48, 3) and not chunks
    assert ours.decode(latents_of(7), progress=True).shape == (1, 25, 32, 48, 3)
    assert chunks == [((1, 2, 4, 6, 4), "decode_next")] * 2
    assert "decode: 100%" in (said := capsys.readouterr().err) and "25/25" in said and "frame/s" in said


def test_an_interrupted_decoder_can_be_used_again(pipelines, monkeypatch):
    """What a chunk hands to the next is given away: nothing of it is used twice."""
    ours, carry, calls = pipelines("tiny_cogvideox_5b"), Component.carry, []
    whole = ours.decode(latents_of(7))

    def interrupted(self, x, carried, *, method):
        calls.append(method)
        out = carry(self, x, carried, method=method)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return out

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Component, "carry", interrupted)
        ours.decode(latents_of(7))
    np.testing.assert_array_equal(ours.decode(latents_of(7)), whole)


FRAMES = {"num_frames": 25, "num_inference_steps": 5, "progress": False, "output_type": "np"}
"""Chunks are of 9, 8 and 8 frames."""


def test_frames_are_handed_out_as_they_are_ready(pipelines, monkeypatch):
    ours, seen, carry = pipelines("tiny_cogvideox_5b"), [], Component.carry
    arguments = {"prompt": PROMPTS, "seed": 1} | SIZE | FRAMES

    def watched(self, x, carried, *, method):
        seen.append("decoded")
        return carry(self, x, carried, method=method)

    monkeypatch.setattr(Component, "carry", watched)
    output = ours(**arguments, callback_on_frames=lambda *told: seen.append(told))
    told = [entry for entry in seen if entry != "decoded"]
    assert ["decoded" if entry == "decoded" else entry[:3] for entry in seen] == [
        part
        for video in range(2)
        for part in ((ours, video, 0), "decoded", (ours, video, 9), "decoded", (ours, video, 17))
    ]
    handed_out = np.concatenate([frames for *_, frames in told]).reshape(2, 25, 32, 48, 3)
    np.testing.assert_array_equal(handed_out, (output.frames * 255).round().astype(np.uint8))
    assert "callback_on_frames" not in output.metadata


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_callback_may_end_a_call_and_the_next_call_is_whole(error, pipelines):
    ours, arguments = pipelines("tiny_cogvideox_5b"), {"prompt": PROMPTS, "seed": 1} | SIZE | FRAMES
    whole = ours(**arguments).frames

    def ends(pipeline, video, first, frames):
        frames[:] = 0  # the callback's own
        if (video, first) == (1, 9):
            raise error("enough")

    with pytest.raises(error, match="enough"):
        ours(**arguments, callback_on_frames=ends)
    np.testing.assert_array_equal(ours(**arguments).frames, whole)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tiny_cogvideox_2b", {"callback_on_frames": "print"}, "callback_on_frames='print' must be callable"),
        (
            "tiny_cogvideox_2b",
            {"callback_on_frames": print, "output_type": "latent"},
            "callback_on_frames=.* sees no frames with output_type='latent'",
        ),
        ("tiny_sd35", {"callback_on_frames": print}, "callback_on_frames=.* is for video models"),
    ],
    ids=["no function", "latents", "images"],
)
def test_a_callback_that_would_see_no_frames_is_refused(name, arguments, message, pipelines):
    with pytest.raises(ValueError, match=message):
        pipelines(name).request(Options(prompt="", **arguments))


@pytest.fixture(scope="module")
def output(pipelines):
    """Two videos."""
    arguments = OTHERS | SIZE | ODD | {"num_inference_steps": 6, "output_type": "np", "progress": False, "fps": 16}
    return pipelines("tiny_cogvideox_5b")(**arguments, **DYNAMIC)


@pytest.mark.parametrize("form", ["pil", "latent"])
def test_frames_have_the_form_that_was_asked_for(form, output, pipelines):
    arguments = OTHERS | SIZE | ODD | DYNAMIC | {"num_inference_steps": 6, "progress": False}
    other = pipelines("tiny_cogvideox_5b")(**arguments, output_type=form)
    assert other.images is None and other.faults == ()
    if form == "latent":
        assert other.frames.shape == (2, 3, 4, 4, 6)
        with pytest.raises(ValueError, match=r"latents \[2, 3, 4, 4, 6\] are no videos"):
            other.save("nowhere")
    else:
        pixels = np.array([[np.asarray(frame) for frame in video] for video in other.frames])
        np.testing.assert_array_equal(pixels, (output.frames * 255).round().astype(np.uint8))


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif", ".avif"])
def test_a_video_is_saved_with_how_it_was_made(suffix, output, tmp_path):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    (path,) = output.save(tmp_path / f"clip{suffix}", numbers=[1])
    with Image.open(path) as image:
        frames = np.stack([np.asarray(frame.convert("RGB"), np.float32) for frame in ImageSequence.Iterator(image)])
    assert frames.shape == (9, 32, 48, 3) and np.abs(frames / 255 - output.frames[1]).mean() < 0.2
    if suffix == ".gif":
        with pytest.raises(ValueError, match="clip.gif cannot be read as a PNG, JPEG, WebP or AVIF"):
            read_metadata(path)
        return
    made = read_metadata(path)
    assert made["prompt"] == PROMPTS[1] and made["seed"] == 4 and made["image"] == 1 and made["fps"] == 16
    assert made["num_frames"] == 9 and made["use_dynamic_cfg"] is True and made["scheduler"] == DPM
    assert made == json.loads(json.dumps(made)) and made["batch"]["seed"] == [3, 4]


def test_a_folder_takes_a_file_of_each_video(output, tmp_path):
    paths = output.save(tmp_path / "new")
    assert [path.suffix for path in paths] == [".webp"] * 2
    assert [read_metadata(path)["prompt"] for path in paths] == PROMPTS
    assert [path.suffix for path in output.save(tmp_path, format="gif")] == [".gif"] * 2
    with pytest.raises(ValueError, match=r"format='jpeg' is not one of \['avif', 'gif', 'mp4', 'png', 'webp'\]"):
        output.save(tmp_path, format="jpeg")
    with pytest.raises(ValueError, match=r"clip.jpg has the suffix of a format that videos are not written in"):
        output.save(tmp_path / "clip.jpg", numbers=[0])
    with pytest.raises(ValueError, match="clip.webp is one file for 2 videos: give a folder"):
        output.save(tmp_path / "clip.webp")


def test_a_pipeline_says_that_it_makes_videos(pipelines):
    first, _, third = repr(pipelines("tiny_cogvideox_15")).splitlines()
    assert first.startswith("Pipeline(CogVideoXPipeline, float32")
    assert third.endswith("videos of 9 frames of 48 x 80 px, sides by 16")
