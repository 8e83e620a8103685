"""Whole pipelines against diffusers: a prompt and an integer seed in, latents and images out."""

from functools import cache

import numpy as np
import pytest
from pipeline_cases import COMMON, LENGTH, PROMPTS, error, load_theirs, run_theirs

from dfa2_jax.pipeline.pipeline import Pipeline

CASES = {
    "sd3": ("tiny_sd3", {"height": 64, "width": 64, "guidance_scale": 5.0, "negative_prompt": "blurry"}),
    "sd35 cfg": ("tiny_sd35", {"height": 128, "width": 128, "guidance_scale": 5.0, "negative_prompt": "blurry"}),
    "sd35 cfg, three prompts, wide": (
        "tiny_sd35",
        {"height": 64, "width": 160, "prompt_2": "a cross", "prompt_3": "a ring", "negative_prompt_3": "a photo"},
    ),
    "sd35 no cfg": ("tiny_sd35", {"height": 128, "width": 96, "guidance_scale": 1.0}),
    "sd35 skip-layer": (
        "tiny_sd35",
        {
            "height": 128,
            "width": 64,
            "guidance_scale": 4.5,
            "skip_guidance_layers": [1, 2],
            "skip_layer_guidance_stop": 0.5,
        },
    ),
    "sd35 clip_skip": ("tiny_sd35", {"height": 64, "width": 64, "clip_skip": 1}),
    "sd35 batch": (
        "tiny_sd35",
        {"prompt": PROMPTS, "height": 64, "width": 64, "num_images_per_prompt": 2, "negative_prompt": ["x", "y"]},
    ),
    "sd35 sigmas": ("tiny_sd35", {"height": 64, "width": 64, "sigmas": [1.0, 0.7, 0.2], "num_inference_steps": 3}),
    "dev": ("tiny_flux_dev", {"height": 128, "width": 128, "guidance_scale": 3.5}),
    "dev, two prompts, tall": ("tiny_flux_dev", {"height": 160, "width": 64, "prompt_2": "a small green star"}),
    "dev true cfg": (
        "tiny_flux_dev",
        {"height": 64, "width": 128, "true_cfg_scale": 3.0, "negative_prompt": "blurry", "guidance_scale": 2.5},
    ),
    "dev batch": ("tiny_flux_dev", {"prompt": PROMPTS, "height": 64, "width": 64, "num_images_per_prompt": 2}),
    "dev sigmas": ("tiny_flux_dev", {"height": 64, "width": 64, "sigmas": [1.0, 0.5, 0.25], "num_inference_steps": 3}),
    "schnell": ("tiny_flux_schnell", {"height": 128, "width": 64, "num_inference_steps": 4, "guidance_scale": 0.0}),
}


@pytest.fixture(scope="module")
def pairs(request, pipelines):
    """folder fixture name -> (ours, theirs) in float32."""
    return cache(lambda name: (pipelines(name), load_theirs(request.getfixturevalue(name))))


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_latents_and_images_equal_diffusers(case, pairs):
    name, arguments = CASES[case]
    ours, theirs = pairs(name)
    arguments = {"prompt": PROMPTS[0]} | COMMON | arguments
    latents = ours(**arguments, seed=7, output_type="latent", progress=False).images
    want = run_theirs(theirs, **arguments, output_type="latent")
    assert latents.shape == want.shape
    assert error(latents, want) < 1e-4

    images = ours(**arguments, seed=7, progress=False).images
    pixels = np.stack([np.asarray(image, np.int32) for image in images])
    want = np.stack(
        [
            np.asarray(image, np.int32)
            for image in theirs.numpy_to_pil(run_theirs(theirs, **arguments, output_type="np"))
        ]
    )
    assert np.abs(pixels - want).max() <= 1
    assert pixels.std() > 10, "the image is flat: the comparison shows nothing"


@pytest.mark.torch
def test_a_seed_per_image_and_given_latents(pairs):
    ours, theirs = pairs("tiny_sd35")
    arguments = {"prompt": PROMPTS, "height": 64, "width": 64} | COMMON
    by_seed = ours(**arguments, seed=[3, 4], output_type="latent", progress=False)
    want = run_theirs(theirs, seed=[3, 4], **arguments, output_type="latent")
    assert error(by_seed.images, want) < 1e-4
    assert by_seed.seeds == [3, 4]

    alone = ours(**arguments | {"prompt": PROMPTS[1]}, seed=4, output_type="latent", progress=False)
    assert error(by_seed.images[1:], alone.images) < 1e-5

    import torch

    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(4)).numpy()
    given = ours(**arguments | {"prompt": PROMPTS[1]}, latents=noise, output_type="latent", progress=False)
    assert error(given.images, alone.images) < 1e-5
    assert given.seeds == [None]


@pytest.mark.torch
@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_dev"])
def test_precomputed_embeddings_replace_the_encoders(name, pairs):
    ours, theirs = pairs(name)
    arguments = {"height": 64, "width": 64} | COMMON
    if name == "tiny_sd35":
        text, negative, pooled, negative_pooled = theirs.encode_prompt(
            PROMPTS[0], None, None, negative_prompt="blurry", max_sequence_length=LENGTH
        )
        given = {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    else:
        text, pooled, _ = theirs.encode_prompt(PROMPTS[0], max_sequence_length=LENGTH)
        given = {}
    given |= {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    given = {key: value.detach().numpy() for key, value in given.items()}
    negative = {"negative_prompt": "blurry"} if name == "tiny_sd35" else {}
    by_prompt = ours(PROMPTS[0], **negative, **arguments, output_type="latent", progress=False).images
    by_embeddings = ours(**given, **arguments, output_type="latent", progress=False).images
    assert error(by_embeddings, by_prompt) < 1e-5


@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_dev"])
def test_watching_changes_no_number(name, capsys, pipelines):
    ours = pipelines(name)
    arguments = {"prompt": PROMPTS[0], "height": 64, "width": 64, "output_type": "latent"} | COMMON
    whole = ours(**arguments, progress=False).images
    np.testing.assert_array_equal(ours(**arguments, progress=True).images, whole)
    assert "8/8" in capsys.readouterr().err

    seen = []
    watched = ours(**arguments, progress=False, callback_on_step_end=lambda *call: seen.append(call)).images
    np.testing.assert_array_equal(watched, whole)
    assert [call[1] for call in seen] == list(range(8)) and seen[0][0] is ours
    assert seen[0][2] == pytest.approx(1000) and seen[0][2] > seen[7][2] > 0
    np.testing.assert_array_equal(seen[-1][3]["latents"], whole)


def test_a_callback_can_replace_the_latents_and_nothing_else(pipelines):
    ours = pipelines("tiny_flux_dev")
    arguments = {"prompt": PROMPTS[0], "height": 64, "width": 64, "output_type": "latent", "progress": False} | COMMON

    def freeze_last(pipeline, step, timestep, values):
        return {"latents": np.zeros_like(values["latents"])} if step == 7 else None

    assert not ours(**arguments, callback_on_step_end=freeze_last).images.any()
    for wrong, message in (
        ({"noise": 1}, "dict of 'latents' alone, got {'noise'"),
        (True, "dict of 'latents' alone, got True"),
        ({"latents": np.zeros((2, 16, 64))}, "2 latents for a batch of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(**arguments, callback_on_step_end=lambda *_, wrong=wrong: wrong)


@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_dev"])
def test_a_callback_can_change_the_latents_in_place(name, pipelines):
    ours = pipelines(name)

    def clear_last(pipeline, step, timestep, values):
        values["latents"] *= step < 7

    arguments = {"height": 64, "width": 64, "output_type": "latent", "progress": False} | COMMON
    assert not ours(PROMPTS[0], **arguments, callback_on_step_end=clear_last).images.any()


@pytest.mark.torch
def test_sd3_without_t5_uses_zeros(tiny_sd35, tmp_path):
    import shutil

    folder = tmp_path / "no-t5"
    shutil.copytree(tiny_sd35, folder)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    index = folder / "model_index.json"
    text = index.read_text()
    import json

    edited = json.loads(text) | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index.write_text(json.dumps(edited))
    arguments = {"prompt": PROMPTS[0], "height": 64, "width": 64} | COMMON
    ours = Pipeline.from_pretrained(folder)(**arguments, seed=7, output_type="latent", progress=False).images
    theirs = load_theirs(tiny_sd35, text_encoder_3=None, tokenizer_3=None)
    assert error(ours, run_theirs(theirs, **arguments, output_type="latent")) < 1e-4


def test_a_pipeline_says_what_it_is_in_three_lines(pipelines):
    first, second, third = repr(pipelines("tiny_sd35")).splitlines()
    assert first.startswith("Pipeline(StableDiffusion3Pipeline, float32, weights ")
    assert "attention layers of 4 heads" in second and third.startswith("  components: text_encoder")


def test_output_says_how_the_images_were_made(pipelines):
    import json

    ours = pipelines("tiny_sd35")
    output = ours(PROMPTS, height=64, width=112, num_inference_steps=2, max_sequence_length=LENGTH, progress=False)
    assert len(output.images) == 2 and output.images[0].size == (112, 64)
    metadata = json.loads(json.dumps(output.metadata))
    again = ours(
        metadata["prompt"],
        **{key: metadata[key] for key in ("height", "width", "num_inference_steps", "guidance_scale", "seed")},
        max_sequence_length=metadata["max_sequence_length"],
        progress=False,
    )
    np.testing.assert_array_equal(again.images[1], output.images[1])
    assert metadata["fingerprint"] == ours.fingerprint and metadata["folder_digest"] == ours.folder_digest
    assert set(output.timings) == {"encode", "denoise", "per_step", "decode", "compile"}
    assert output.timings["per_step"] == pytest.approx(output.timings["denoise"] / 2)
    assert output.timings["compile"] > 0 and again.timings["compile"] == 0


@pytest.mark.usefixtures("no_shape_checks")
def test_numpy_arguments_are_taken_and_recorded_as_plain_ones(pipelines):
    import json

    ours = pipelines("tiny_sd35")
    common = {"height": 64, "width": 64, "max_sequence_length": 16, "progress": False}
    plain = {"seed": 5, "guidance_scale": 2.0, "sigmas": [1.0, 0.5], "skip_guidance_layers": [1]}
    numpy = {
        "seed": np.int64(5), "guidance_scale": np.float32(2.0), "sigmas": np.array([1.0, 0.5]),
        "skip_guidance_layers": (1,),
    }  # fmt: skip
    outputs = [ours(PROMPTS[0], **common, **options) for options in (plain, numpy)]
    np.testing.assert_array_equal(*(np.asarray(output.images[0]) for output in outputs))
    recorded = [json.loads(json.dumps(output.metadata)) for output in outputs]
    assert recorded[0] == recorded[1]
