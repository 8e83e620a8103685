"""FLUX.1-Fill against diffusers' pipeline."""

import numpy as np
import pytest
from damage import copy_model, edit_json, refuses
from PIL import Image
from pipeline_cases import PROMPTS, error, load_theirs, planned_error, random_plan, run_theirs

from dfa2_jax import Pipeline, calibrate
from dfa2_jax.options import Options

CALL = {"height": 64, "width": 96, "num_inference_steps": 6, "max_sequence_length": 16}
LATENT = {"output_type": "latent", "progress": False}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
MASK = Image.fromarray((np.indices((50, 80)).sum(0) % 60 < 25).astype(np.uint8) * 255)
CASES = {
    "one": {"prompt": PROMPTS[0], "guidance_scale": 30.0},
    "weak": {"prompt": PROMPTS[1], "strength": 0.5, "guidance_scale": 5.0},
    "batch": {"prompt": PROMPTS, "seed": [3, 4], "image": [PICTURE, PICTURE.rotate(90)]},
}


@pytest.fixture(scope="module")
def folder(tiny_flux_dev, tmp_path_factory):
    """tiny_flux_dev, with a transformer of tokens that hold picture and mask, too."""
    import torch
    from diffusers import FluxFillPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    dev = load_theirs(tiny_flux_dev)
    transformer = FluxTransformer2DModel.from_config({**dev.transformer.config, "in_channels": 384, "out_channels": 64})
    weights = dev.transformer.state_dict()
    weights["x_embedder.weight"] = torch.randn(weights["x_embedder.weight"].shape[0], 384) / 8
    transformer.load_state_dict(weights)
    path = tmp_path_factory.mktemp("fill")
    names = "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"
    components = {name: dev.components[name] for name in names}
    FluxFillPipeline(**components, transformer=transformer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return load_theirs(folder)


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_latents_and_images_equal_diffusers(case, ours, theirs):
    arguments = {"image": PICTURE, "mask_image": MASK, "seed": 7} | CALL | CASES[case]
    want = run_theirs(theirs, **arguments, output_type="latent")
    latents = ours(**arguments, **LATENT).images
    assert latents.shape == want.shape and error(latents, want) < 1e-4
    grey = PICTURE.convert("L").convert("RGB")
    assert error(ours(**arguments | {"image": grey}, **LATENT).images, want) > 1e-2, "the picture is of no effect"
    images = ours(**arguments, output_type="np", progress=False).images
    assert np.abs(images - run_theirs(theirs, **arguments, output_type="np")).max() <= 1 / 255


@pytest.mark.torch
def test_a_planned_call_equals_diffusers_with_masks(ours, theirs):
    arguments = {"prompt": PROMPTS[0], "image": PICTURE, "mask_image": MASK, "seed": 7, "guidance_scale": 30.0} | CALL
    plan = random_plan(ours.setting(**arguments, output_type="latent"), 1)
    far, output = planned_error(ours, theirs, arguments, plan)
    assert far < 1e-4 < error(output.images, ours(**arguments, **LATENT).images)


def test_defaults_are_those_of_diffusers(ours):
    request = ours.request(Options(prompt="", image=PICTURE, mask_image=MASK))
    assert (request.steps, request.guidance_scale, request.length, request.strength) == (50, 30.0, 512, 1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "image and mask_image must be given"),
        ({"image": PICTURE}, "mask_image must be given"),
        (
            {"image": PICTURE, "mask_image": MASK, "true_cfg_scale": 2.0},
            "true_cfg_scale=2.0 is for other FLUX",
        ),
        ({"image": np.zeros((1, 16, 8, 12)), "mask_image": MASK}, "image must hold pixels, not latents"),
    ],
)
def test_a_call_that_fills_nothing_is_refused(arguments, message, ours):
    with pytest.raises(ValueError, match=message):
        ours("a", **CALL, **LATENT, **arguments)


def test_another_transformer_is_refused_before_it_is_read(folder, tmp_path):
    model = copy_model(folder, tmp_path)
    edit_json(model / "transformer/config.json", in_channels=128)
    with refuses(model, "in_channels=128 of a FluxFillPipeline must hold latents twice"):
        Pipeline.from_pretrained(model)


@pytest.mark.parametrize("budget", [{"delta": 0.5, "windows": (2,), "tiles": (8, 8)}, {"speedup": 2.0}])
def test_plans_are_calibrated_with_picture_and_mask(budget, ours):
    call = {"image": PICTURE, "mask_image": MASK} | CALL
    plan = calibrate(ours, PROMPTS, **call, **budget, progress=False)
    assert plan.choices[1:].any() or len(plan.nodes) == 3
    output = ours("a", image=PICTURE, mask_image=MASK, plan=plan, **LATENT)
    assert output.metadata["num_nodes"] == len(plan.nodes)
