"""What the pipeline refuses, before any work, and what it says."""

import logging

import numpy as np
import pytest

from dfa2_jax.options import Options
from dfa2_jax.pipeline.pipeline import Pipeline

PROMPT = "a large red circle"
SD3_EMBEDS = {"prompt_embeds": np.zeros((1, 109, 96)), "pooled_prompt_embeds": np.zeros((1, 80))}


@pytest.fixture(scope="module")
def sd35(pipelines):
    return pipelines("tiny_sd35")


@pytest.fixture(scope="module")
def dev(pipelines):
    return pipelines("tiny_flux_dev")


SD3_REFUSALS = [
    ({}, "prompt or prompt_embeds: neither"),
    ({"prompt": PROMPT} | SD3_EMBEDS, "prompt or prompt_embeds: both"),
    ({"prompt": []}, "not empty"),
    ({"prompt_2": PROMPT}, "prompt_2='a large red circle' needs prompt"),
    ({"prompt": PROMPT, "prompt_2": [PROMPT, PROMPT]}, "'prompt': 1, 'prompt_2': 2"),
    ({"prompt": PROMPT, "negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ({"prompt": PROMPT, "height": 100}, "100 x 128 must be multiples of 16: try 96 x 128"),
    ({"prompt": PROMPT, "height": 0}, "height=0"),
    ({"prompt": PROMPT, "height": 1024}, "1024 x 128 exceeds the position table: 384 px a side"),
    ({"prompt": PROMPT, "height": 10**9}, "height=1000000000 exceeds 16384"),
    ({"prompt": PROMPT, "num_inference_steps": 1001}, "num_inference_steps=1001 exceeds 1000"),
    ({"prompt": PROMPT, "sigmas": [0.5] * 1001}, "sigmas=1001 exceeds 1000"),
    ({"prompt": PROMPT, "num_images_per_prompt": 1001}, "num_images_per_prompt=1001 exceeds 1000"),
    ({"prompt": PROMPT, "guidance_scale": 1e38}, r"guidance_scale=1e\+38 exceeds 10000"),
    ({"prompt": PROMPT, "latents": np.full((1, 16, 16, 16), np.nan)}, r"latents \[1, 16, 16, 16\] holds .* not finite"),
    (SD3_EMBEDS | {"pooled_prompt_embeds": np.full((1, 80), np.inf)}, "pooled_prompt_embeds .* not finite"),
    ({"prompt_embeds": "red", "pooled_prompt_embeds": np.zeros((1, 80))}, "prompt_embeds='red' is no array of numbers"),
    ({"prompt": PROMPT, "num_inference_steps": 0}, "num_inference_steps=0"),
    ({"prompt": PROMPT, "sigmas": [1.0, 0.5], "num_inference_steps": 3}, "num_inference_steps=3 but 2 sigmas"),
    ({"prompt": PROMPT, "sigmas": [2.0]}, r"\(0, 1\]"),
    ({"prompt": PROMPT, "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    ({"prompt": PROMPT, "seed": [1, 2]}, "2 seeds for a batch of 1"),
    ({"prompt": PROMPT, "seed": -1}, "seed=-1"),
    ({"prompt": PROMPT, "latents": np.zeros((1, 16, 4, 4))}, r"\[1, 16, 4, 4\].*'batch', 16, 16, 16"),
    ({"prompt": PROMPT, "latents": np.zeros((2, 16, 16, 16))}, "2 latents for a batch of 1"),
    ({"prompt_embeds": SD3_EMBEDS["prompt_embeds"]}, "pooled_prompt_embeds is None"),
    ({"prompt_embeds": np.zeros((1, 5, 7)), "pooled_prompt_embeds": np.zeros((1, 80))}, r"tokens, 96\].*\[1, 5, 7\]"),
    ({"prompt_embeds": np.zeros((1, 5, 96)), "pooled_prompt_embeds": np.zeros((1, 3))}, r"\[1, 80\], got \[1, 3\]"),
    ({"prompt": PROMPT, "max_sequence_length": 513}, "513 exceeds 512"),
    ({"prompt": PROMPT, "clip_skip": 3}, "clip_skip=3 must be from 0 to 2"),
    ({"prompt": PROMPT, "clip_skip": -1}, "clip_skip=-1"),
    ({"prompt": PROMPT, "skip_guidance_layers": [4]}, r"\[4\] are not among the model's 4 layers"),
    ({"prompt": PROMPT, "true_cfg_scale": 2.0}, "true_cfg_scale=2.0"),
    ({"prompt": PROMPT, "output_type": "torch"}, "output_type='torch'"),
    ({"prompt": "\ud800"}, "prompt='\\\\ud800' is not valid text: surrogates not allowed"),
    ({"prompt": PROMPT, "guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
    ({"prompt": PROMPT, "skip_layer_guidance_scale": float("inf")}, "skip_layer_guidance_scale=inf"),
    ({"prompt_embeds": np.zeros((0, 5, 96)), "pooled_prompt_embeds": np.zeros((0, 80))}, r"96\], got \[0, 5, 96\]"),
    ({"prompt": PROMPT, "sigmas": []}, r"sigmas=\[\] must be a list of numbers"),
]

FLUX_REFUSALS = [
    ({"prompt": PROMPT, "prompt_3": PROMPT}, "prompt_3 .* 2 text encoders"),
    ({"prompt": PROMPT, "clip_skip": 1}, "for SD3 only"),
    ({"prompt": PROMPT, "skip_guidance_layers": [1]}, "for SD3 only"),
    ({"prompt": PROMPT, "height": 8}, "at least 16"),
    ({"prompt": [PROMPT] * 20, "height": 16384, "width": 16384}, "20 images of 16384 x 16384 are 5,368,709,120 pixels"),
    ({"prompt": PROMPT, "latents": np.zeros((1, 16, 16, 16))}, "'batch', 64, 64"),
]


@pytest.mark.parametrize(("arguments", "message"), SD3_REFUSALS, ids=range(len(SD3_REFUSALS)))
def test_sd3_refuses(arguments, message, sd35):
    arguments = {"height": 128, "width": 128, "num_inference_steps": None, "progress": False} | arguments
    with pytest.raises(ValueError, match=message):
        sd35(**arguments)


@pytest.mark.parametrize(("arguments", "message"), FLUX_REFUSALS, ids=range(len(FLUX_REFUSALS)))
def test_flux_refuses(arguments, message, dev):
    with pytest.raises(ValueError, match=message):
        dev(**{"height": 128, "width": 128, "progress": False} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [1]}, "list of strings"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
        ({"seed": [[1]]}, r"seed=\[\[1\]\] must be an integer, or one"),
        ({"sigmas": 0.5}, "sigmas=0.5 must be a list"),
        ({"guidance_scale": "5"}, "guidance_scale='5' must be a finite number"),
        ({"skip_guidance_layers": [0.5]}, r"skip_guidance_layers=\[0.5\] must be a list of layer numbers"),
        ({"clip_skip": 0.5}, "clip_skip=0.5 must be an integer"),
        ({"guidance_scale": np.complex64(1)}, "guidance_scale=.*1.* must be a finite number"),
        ({"guidance_scale": 10**400}, "guidance_scale=10000.* exceeds 10000"),
        ({"sigmas": [None, "a"]}, r"sigmas=\[None, 'a'\] is no array of numbers"),
        ({"latents": np.zeros((1, 16, 8, 8), np.complex64)}, r"latents=[\s\S]* is no array .* it is complex64"),
        ({"latents": np.zeros((1, 16, 8, 8), bool)}, r"latents=[\s\S]* is no array of numbers: it is bool"),
        ({"latents": np.full((1, 16, 8, 8), 1e300)}, r"latents \[1, 16, 8, 8\] holds numbers that are not finite"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_wrong_types_are_refused_without_a_type_checker_too(arguments, message, sd35):
    given = {"prompt": PROMPT, "height": 64, "width": 64, "progress": False} | arguments
    with pytest.raises(ValueError, match=message):
        sd35(**given)


@pytest.mark.torch
@pytest.mark.parametrize("turn", [lambda x: x.bfloat16(), lambda x: x.requires_grad_()], ids=["bfloat16", "gradient"])
def test_embeddings_come_straight_from_a_torch_encoder(turn, dev):
    import torch

    text, pooled = (turn(torch.linspace(-1, 1, n)) for n in (5 * 96, 32))
    call = {"height": 64, "width": 64, "num_inference_steps": 1}
    made = dev.prepare(Options(prompt_embeds=text.reshape(1, 5, 96), pooled_prompt_embeds=pooled[None], **call))
    np.testing.assert_array_equal(made.inputs.conditions.pooled[0], pooled.detach().float().numpy())


@pytest.mark.parametrize("attend", ["dense", lambda *args: None])
@pytest.mark.usefixtures("no_shape_checks")
def test_an_attention_must_be_an_attention(attend, dev):
    with pytest.raises(ValueError, match="attend=.* must be a hashable object with `memory` and `__call__`"):
        dev(PROMPT, height=64, width=64, attend=attend, progress=False)


@pytest.mark.usefixtures("no_shape_checks")
def test_a_plan_must_be_a_plan(sd35):
    with pytest.raises(ValueError, match=r"plan='plan.json' must be a Plan: Plan.load\(path\) reads one"):
        sd35(PROMPT, plan="plan.json")


def test_flux_floors_the_size_with_a_warning(dev, caplog):
    with caplog.at_level(logging.WARNING, "dfa2_jax"):
        output = dev(PROMPT, height=79, width=64, num_inference_steps=1, max_sequence_length=16, progress=False)
    assert output.images[0].size == (64, 64)
    assert "79 x 64 are not multiples of 16: the image will be 64 x 64" in caplog.text


def test_long_prompts_are_cut_with_a_warning(sd35, caplog):
    with caplog.at_level(logging.WARNING, "dfa2_jax"):
        sd35(PROMPT * 40, height=64, width=64, num_inference_steps=1, max_sequence_length=16, progress=False)
    assert "cut to 77" in caplog.text and "cut to 16" in caplog.text


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae"])
def test_missing_components_are_named(component, tiny_sd35, tmp_path):
    import json
    import shutil

    folder = tmp_path / "partial"
    shutil.copytree(tiny_sd35, folder)
    shutil.rmtree(folder / component)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {component: [None, None]}))
    pipeline = Pipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"has no {component}"):
        pipeline(PROMPT, height=64, width=64, num_inference_steps=1, progress=False)
    if component != "vae":
        output = pipeline(**SD3_EMBEDS, guidance_scale=1.0, height=64, width=64, num_inference_steps=1, progress=False)
        assert output.images[0].size == (64, 64)


@pytest.mark.usefixtures("no_shape_checks")
def test_prompts_of_numpy_are_lists(sd35):
    prompts = np.array(["a red circle", "a star"])
    request = sd35.request(Options(prompt=prompts, prompt_2=prompts[::-1], height=64, width=64))
    assert request.positive.texts == [
        ["a red circle", "a star"],
        ["a star", "a red circle"],
        ["a red circle", "a star"],
    ]
