"""HunyuanVideo's pipeline: against diffusers, by plans, with prompts of any length, and what calls are refused."""

import logging
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import copy_model, edit_json, refuses
from flax import nnx
from pipeline_cases import PROMPTS, check_planned, error, load_theirs, run_theirs

from dfa2_jax import Pipeline, Plan, PlanError, calibrate, cli
from dfa2_jax.io.images import read_metadata
from dfa2_jax.options import Options
from dfa2_jax.sampling.noise import torch_randn

NAME = "tiny_hunyuanvideo"
CALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 6, "max_sequence_length": 24, "seed": 7}
LATENT = {"output_type": "latent", "progress": False}
GUIDED = {"true_cfg_scale": 3.0, "negative_prompt": ["blurry", "a small green star on the left of a ring"]}
LONG = " and ".join(PROMPTS * 3)
"""More tokens than are kept."""
CASES = {
    "6 steps": {"prompt": PROMPTS[0]},
    "20 steps": {"prompt": PROMPTS[1], "num_inference_steps": 20},
    "two lengths": {"prompt": PROMPTS, "seed": [3, 4]},
    "true cfg": {"prompt": PROMPTS, "num_frames": 5} | GUIDED,
    "prompt_2": {"prompt": LONG, "prompt_2": "a blue ring", "guidance_scale": 1.0, "sigmas": [1.0, 0.6, 0.3]},
}


@pytest.fixture(scope="module")
def theirs(request):
    """diffusers' pipeline in float32."""
    return cache(lambda: load_theirs(request.getfixturevalue(NAME)))


@pytest.fixture
def ours(pipelines):
    return pipelines(NAME)


def arguments_of(case):
    arguments = CALL | CASES[case]
    if "sigmas" in arguments:
        del arguments["num_inference_steps"]
    return arguments


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_latents_equal_diffusers(case, ours, theirs):
    arguments = arguments_of(case)
    latents = ours(**arguments, **LATENT).frames
    reference = {"num_inference_steps": 3} | arguments  # which their helper reads beside sigmas
    want = run_theirs(theirs(), **reference, output_type="latent")
    assert latents.shape == want.shape and latents.dtype == np.float32
    assert latents.shape == (np.size(arguments["prompt"]), 4, (arguments["num_frames"] + 3) // 4, 4, 6)
    assert error(latents, want) < 1e-4


@pytest.mark.torch
def test_frames_equal_diffusers(ours, theirs):
    """Two windows of latent frames are blended."""
    arguments = CALL | {"prompt": PROMPTS[0], "num_frames": 25, "num_inference_steps": 2}
    output = ours(**arguments, output_type="np", progress=False)
    want = run_theirs(theirs(), **arguments, output_type="np")
    assert output.images is None and output.frames.shape == want.shape == (1, 25, 32, 48, 3)
    assert np.abs(output.frames - want).max() <= 1 / 255
    assert output.frames.std() > 0.05, "the video is flat: the comparison shows nothing"


@pytest.mark.parametrize(
    "budget", [{"delta": 0.5, "windows": (2,), "tiles": (8, 8)}, {"speedup": 2.0, "heads": "full"}]
)
def test_plans_are_calibrated_with_texts_of_any_length(budget, ours, tmp_path):
    call = CALL | {"progress": False}
    plan = calibrate(ours, PROMPTS, **call, **budget)
    assert plan.setting.num_frames == 9 and plan.setting.layers[0].num_text == 24
    assert plan.choices[1:].any() or len(plan.nodes) == 3
    plan.save(tmp_path / "plan.json")
    output = ours(LONG, plan=Plan.load(tmp_path / "plan.json"), **LATENT)
    assert output.frames.shape == (1, 4, 3, 4, 6) and output.metadata["max_sequence_length"] == 24


@pytest.mark.parametrize("name", ["tiny_hunyuanvideo", "tiny_flux_dev"])
@pytest.mark.parametrize(
    "budget", [{"delta": 0.5, "windows": (2,), "tiles": (8, 8)}, {"speedup": 1.5, "heads": "full"}]
)
def test_plans_of_true_cfg_decide_its_scale(name, budget, pipelines, tmp_path, caplog):
    pipeline, negative = pipelines(name), {"negative_prompt": "blurry"}
    call = CALL if name == "tiny_hunyuanvideo" else {"height": 64, "width": 64, "num_inference_steps": 4}
    call = call | {"progress": False}
    found = calibrate(pipeline, PROMPTS, **call, **budget, **negative, true_cfg_scale=3.0)
    assert found.setting.doubled_batch and (found.calibration or found.step_calibration).true_cfg_scale == 3
    found.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    output = pipeline("a ring", plan=plan, **LATENT, **negative)
    assert output.metadata["cfg_scale"] == output.metadata["true_cfg_scale"] == 3
    assert pipeline("a ring", plan=plan, **LATENT, **negative, true_cfg_scale=2.0).metadata["cfg_scale"] == 2
    with pytest.raises(PlanError, match="doubled_batch is True in the plan.*pass .*true_cfg_scale and negative_prompt"):
        pipeline("a ring", plan=plan, **LATENT)
    assert "true_cfg_scale=3 has no effect: it needs a negative_prompt" in caplog.text
    for half in (negative, {"true_cfg_scale": 3.0}):
        with pytest.raises(ValueError, match=r"negative_prompt=.* and true_cfg_scale=.* have no effect"):
            calibrate(pipeline, PROMPTS, **call, **half, **budget)


def test_the_command_knows_its_videos_by_the_guidance_that_a_plan_decides(ours, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, **options: ours)
    call = CALL | {"num_inference_steps": 3, "progress": False, "negative_prompt": "blurry", "true_cfg_scale": 3.0}
    calibrate(ours, PROMPTS, **call, delta=0.5, windows=(2,), tiles=(8, 8)).save(tmp_path / "plan.json")
    words = ["sample", "folder", "--prompt", "a", "--plan", str(tmp_path / "plan.json"), "--negative-prompt", "blurry"]
    for said in ("", "it is made already"):
        assert cli.main([*words, "--quiet", "--out", str(tmp_path / "out")]) == 0
        assert said in capsys.readouterr().err
    (path,) = (tmp_path / "out").iterdir()
    assert read_metadata(path)["true_cfg_scale"] == 3


@pytest.mark.parametrize("precision", ["int8", "int8_weights"])
def test_blocks_of_8_bits_make_nearly_the_same(precision, ours, tiny_hunyuanvideo):
    want = ours(PROMPTS, **CALL, **LATENT).frames
    quantised = Pipeline.from_pretrained(tiny_hunyuanvideo, dtype=precision)
    small = {path[0] for path, x in nnx.to_flat_state(quantised.transformer.params) if x.dtype == jnp.int8}
    assert small == {"transformer_blocks", "single_transformer_blocks"}
    assert 1e-4 < error(quantised(PROMPTS, **CALL, **LATENT).frames, want) < 0.02


def test_the_command_samples(ours, tiny_hunyuanvideo, monkeypatch, tmp_path):
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, **options: ours)
    words = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2", "--max-sequence-length", "24"]
    words += ["--true-cfg-scale", "2.5", "--negative-prompt", "blurry", "--prompt", "a star", "--quiet"]
    assert cli.main(["sample", str(tiny_hunyuanvideo), *words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    made = read_metadata(path)
    assert made["num_frames"] == 5 and made["fps"] == 24 and made["cfg_scale"] == 2.5
    assert made["pipeline"] == "HunyuanVideoPipeline" and made["embedded_guidance"] == 6.0


def test_defaults_are_those_of_diffusers(ours):
    request = ours.request(Options(prompt="", output_type="latent"))
    assert (request.height, request.width, request.num_frames, request.latent_frames) == (720, 1280, 129, 33)
    assert (request.steps, request.guidance_scale, request.length, request.cfg_scale) == (50, 6.0, 256, None)
    assert ours.request(Options(prompt="", output_type="latent", true_cfg_scale=2.0)).cfg_scale is None


@pytest.mark.torch
@pytest.mark.parametrize(
    "seeds", [range(1, 2), pytest.param(range(2, 22), marks=pytest.mark.long)], ids=["one", "twenty"]
)
@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["dense", "true cfg"])
def test_a_planned_call_equals_diffusers_with_masks(seeds, guided, ours, tiny_hunyuanvideo):
    arguments = CALL | {"prompt": PROMPTS} | guided
    check_planned(ours, load_theirs(tiny_hunyuanvideo), arguments, arguments, seeds)


@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["dense", "true cfg"])
def test_devices_share_rows_and_tokens(guided, ours, tiny_hunyuanvideo):
    """Texts differ in length: rows of a batch, then tokens of rows."""
    prompts = PROMPTS[0] if guided else PROMPTS  # two rows on four devices, one text of them negative
    guided = guided and guided | {"negative_prompt": "blurry"}
    one = ours(prompts, **CALL, **guided, **LATENT).frames
    many = Pipeline.from_pretrained(tiny_hunyuanvideo, devices=4)(prompts, **CALL, **guided, **LATENT).frames
    assert error(many, one) < 1e-5


def test_devices_find_the_plan_of_one_and_follow_it(ours, tiny_hunyuanvideo):
    """Two texts differ in length, and lie one on each device."""
    two, call = Pipeline.from_pretrained(tiny_hunyuanvideo, devices=2), CALL | {"num_inference_steps": 3}
    calibration = call | {"progress": False, "delta": 0.5, "windows": (2,), "tiles": (8, 8)}
    plans = [calibrate(x, PROMPTS, **calibration) for x in (ours, two)]
    np.testing.assert_array_equal(*(plan.choices for plan in plans))
    np.testing.assert_allclose(*(plan.calibration.errors for plan in plans), rtol=1e-4, atol=1e-6)
    one, many = (x(PROMPTS, **call, **LATENT, plan=plans[0]).frames for x in (ours, two))
    assert error(many, one) < 1e-5


def test_prompts_of_any_length_share_a_program(tiny_hunyuanvideo, compilations):
    ours, call = Pipeline.from_pretrained(tiny_hunyuanvideo), CALL | {"num_frames": 5}
    plan = Plan.full(ours.setting(prompt="", **call, **LATENT)).with_method(1, 0, 0, "cached")
    variants = {"dense": {}, "planned": {"plan": plan}, "guided": GUIDED | {"negative_prompt": "blurry"}}
    jax.clear_caches()  # whatever other tests compiled
    for options in variants.values():
        ours(PROMPTS[0], **call, **LATENT, **options)
        assert compilations
        compilations.clear()
        for prompt in ("", PROMPTS[1], LONG):
            ours(prompt, **call, **LATENT, **options)
        assert not compilations
    ours("", **call, **LATENT, **GUIDED | {"negative_prompt": LONG, "true_cfg_scale": 6.0}, guidance_scale=1.0)
    assert not compilations


def test_embeddings_and_latents_start_the_same_call(ours, caplog):
    given = ours.encode_prompt([PROMPTS, PROMPTS], max_sequence_length=24)
    assert given.lengths.tolist() == given.attention_mask.sum(1).tolist() and len({*given.lengths}) == 2
    want = ours(PROMPTS, **CALL, **LATENT).frames
    embeds = {"prompt_embeds": given.text, "pooled_prompt_embeds": given.pooled}
    call = {name: value for name, value in CALL.items() if name not in ("max_sequence_length", "seed")}
    latents = torch_randn(7, (2, 4, 3, 4, 6))
    mask = {"prompt_attention_mask": given.attention_mask}
    output = ours(**embeds, **mask, latents=latents, **call, **LATENT)
    np.testing.assert_array_equal(output.frames, want)
    assert output.metadata["prompt_attention_mask"] == "array[2, 24]"
    assert output.metadata["max_sequence_length"] is None and not caplog.messages, "nothing was encoded"
    ours.request(Options(**embeds, **mask, **call, output_type="latent", max_sequence_length=8))
    assert caplog.messages == ["max_sequence_length=8 has no effect: embeddings have lengths of their own."]
    other = embeds["prompt_embeds"].copy()
    other[1, given.lengths[1] :] = 50  # padding is not read
    padded = ours(**embeds | {"prompt_embeds": other}, **mask, latents=latents, **call, **LATENT).frames
    np.testing.assert_array_equal(padded, want)
    with pytest.raises(ValueError, match=r"latents have shape \[2, 3, 4, 4, 6\], but .* need \['batch', 4, 3, 4, 6\]"):
        ours(PROMPTS, **call, latents=latents.swapaxes(1, 2), **LATENT)


def test_prompts_are_encoded_alone_or_in_lists(ours):
    want = ours.encode_prompt([["a red ring"], ["a red ring"]])
    for texts in ("a red ring", ["a red ring"]):
        given = ours.encode_prompt(texts)
        np.testing.assert_array_equal(given.text, want.text)
        np.testing.assert_array_equal(given.lengths, want.lengths)
    for texts, sizes in (([["a"]], "[1]"), ([["a"], ["a", "b"]], "[1, 2]"), ([["a"]] * 3, "[1, 1, 1]")):
        with pytest.raises(ValueError, match=f"takes .*2 lists of as many.*{re.escape(sizes)}"):
            ours.encode_prompt(texts)


def test_embeddings_of_two_sides_may_differ_in_padded_length(ours):
    """Masks of NumPy's booleans serve, too."""
    positive, negative = (ours.encode_prompt(text, max_sequence_length=24) for text in ("a red ring", "bad"))
    call = (
        {name: value for name, value in CALL.items() if name != "max_sequence_length"}
        | LATENT
        | {"true_cfg_scale": 3.0}
    )
    sides = [("", positive, 24), ("negative_", negative, 24)], [("", positive, 24), ("negative_", negative, 9)]
    frames = []
    for texts in sides:
        given = {f"{side}prompt_embeds": text.text[:, :cut] for side, text, cut in texts}
        given |= {f"{side}pooled_prompt_embeds": text.pooled for side, text, _ in texts}
        given |= {f"{side}prompt_attention_mask": text.attention_mask[:, :cut] > 0 for side, text, cut in texts}
        frames.append(ours(**call | given).frames)
    np.testing.assert_array_equal(*frames)


@pytest.mark.parametrize("name", ["tiny_hunyuanvideo", "tiny_flux_dev"])
def test_half_of_true_cfg_is_of_no_effect_and_a_warning_says_so(name, pipelines, caplog):
    pipeline, size = pipelines(name), {"prompt": "a", "height": 64, "width": 64, "output_type": "latent"}
    halves = {
        "negative_prompt has no effect": {"negative_prompt": "b"},
        "needs a negative_prompt": {"true_cfg_scale": 3.0},
    }
    with caplog.at_level(logging.WARNING, "dfa2_jax"):
        pipeline.request(Options(**size))
        pipeline.request(Options(**size, negative_prompt="b", true_cfg_scale=3.0))
        assert not caplog.messages
        for said, half in halves.items():
            caplog.clear()
            pipeline.request(Options(**size, **half))
            assert said in caplog.text


def test_llama_may_have_weights_of_8_bits(ours, tiny_hunyuanvideo):
    small = Pipeline.from_pretrained(tiny_hunyuanvideo, text_encoder_dtype="int8_weights")
    exact, near = (one.encode_prompt("a red ring") for one in (ours, small))
    kept = slice(0, int(exact.lengths[0]))
    assert 1e-4 < error(near.text[:, kept], exact.text[:, kept]) < 0.02
    np.testing.assert_array_equal(near.pooled, exact.pooled)


def test_a_second_prompt_is_of_no_effect_and_a_warning_says_so(ours, caplog):
    with caplog.at_level(logging.WARNING, "dfa2_jax"):
        ours.prepare(Options(prompt="a", output_type="latent", **CALL))
        ours.prepare(Options(prompt="a", prompt_2="a", output_type="latent", **CALL))
        assert not caplog.messages
        ours.prepare(Options(prompt="a", prompt_2="b", output_type="latent", **CALL))
        said = "%sprompt_2 is of no effect: as in diffusers, HunyuanVideo's CLIP reads %sprompt."
        assert caplog.messages == [said % ("", "")]
        caplog.clear()
        guided = GUIDED | {"negative_prompt": "b", "negative_prompt_2": "c"}
        ours.prepare(Options(prompt="a", output_type="latent", **CALL, **guided))
    assert caplog.messages == [said % ("negative_", "negative_")]


EMBEDS = {"prompt": None, "prompt_embeds": np.zeros((1, 5, 48)), "pooled_prompt_embeds": np.zeros((1, 32))}


def masked(*mask):
    return EMBEDS | {"prompt_attention_mask": mask}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 10}, "num_frames=10 must be 1 more than a multiple of 4: try 9 or 13"),
        ({"height": 40}, "height x width = 40 x 1280 must be multiples of 16: try 32 x 1280"),
        ({"clip_skip": 1}, "clip_skip=1 is for SD3 only"),
        ({"skip_guidance_layers": [1]}, "skip_guidance_layers=.* is for SD3 only"),
        ({"use_dynamic_cfg": True}, "use_dynamic_cfg"),
        ({"scheduler": "CogVideoXDDIMScheduler"}, "'CogVideoXDDIMScheduler'.*FlowMatchEulerDiscreteScheduler"),
        ({"prompt_3": "a"}, "prompt_3 is not None, but this model has 2 text encoders"),
        (EMBEDS, "prompt_embeds needs prompt_attention_mask too"),
        ({"prompt_attention_mask": [[1]]}, "prompt_attention_mask goes with prompt_embeds, which is None"),
        (masked([1, 1, 1, 1]), r"prompt_attention_mask must be \[1, 5\].*got \[1, 4\]"),
        (masked([0, 1, 1, 1, 1]), "prompt_attention_mask must be 1 for the tokens of a text, one at least"),
        (masked([0, 0, 0, 0, 0]), "prompt_attention_mask must be 1 for the tokens of a text, one at least"),
        (masked([1, 1, 0.5, 0, 0]), "prompt_attention_mask must be 1 for the tokens of a text, one at least"),
    ],
    ids=str,
)
def test_a_call_that_no_video_can_be_is_refused(arguments, message, ours):
    with pytest.raises(ValueError, match=message):
        ours.request(Options(**{"prompt": "", "output_type": "latent"} | arguments))


@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_schnell", "tiny_cogvideox_2b"])
def test_masks_are_refused_where_text_is_attended_whole(name, pipelines):
    with pytest.raises(ValueError, match="prompt_attention_mask is for HunyuanVideo only"):
        pipelines(name).request(Options(prompt="", prompt_attention_mask=[[1]]))


@pytest.mark.parametrize(
    "kind",
    [
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideo15Pipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
    ],
)
def test_other_pipelines_are_refused_by_name(kind, tiny_hunyuanvideo, tmp_path):
    folder = copy_model(tiny_hunyuanvideo, tmp_path)
    edit_json(folder / "model_index.json", _class_name=kind)
    with refuses(folder, kind):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"image_condition_type": "token_replace"}, "image_condition_type"), ({"in_channels": 9}, "out_channels")],
    ids=str,
)
def test_transformers_of_image_to_video_are_refused(changes, message, tiny_hunyuanvideo, tmp_path):
    folder = copy_model(tiny_hunyuanvideo, tmp_path)
    edit_json(folder / "transformer" / "config.json", **changes)
    with refuses(folder, message):
        Pipeline.from_pretrained(folder)
