"""FLUX.1-Kontext against diffusers' pipeline: the tokens of a picture beside the image's."""

from types import SimpleNamespace

import numpy as np
import pytest
from damage import edit_json
from PIL import Image
from pipeline_cases import PROMPTS, error, load_theirs, planned_error, random_plan, run_theirs

from dfa2_jax import Pipeline, Plan, PlanError, calibrate
from dfa2_jax.families.flux.family import REFERENCE_SIZES
from dfa2_jax.options import Options

CALL = {"height": 64, "width": 96, "num_inference_steps": 6, "max_sequence_length": 16, "guidance_scale": 2.5}
LATENT = {"output_type": "latent", "progress": False}
LATENTS = np.random.default_rng(0).standard_normal((1, 16, 6, 10)).astype(np.float32)
"""A picture of 15 tokens; images have 24."""
CASES = {
    "one": {"prompt": PROMPTS[0]},
    "no picture": {"prompt": PROMPTS[0], "image": None},
    "batch": {"prompt": PROMPTS, "seed": [3, 4]},
    "true cfg": {"prompt": PROMPTS[1], "true_cfg_scale": 3.0, "negative_prompt": "blurry"},
}


@pytest.fixture(scope="module")
def folder(tiny_flux_dev, tmp_path_factory):
    from shutil import copytree

    path = tmp_path_factory.mktemp("kontext") / "model"
    copytree(tiny_flux_dev, path)
    edit_json(path / "model_index.json", _class_name="FluxKontextPipeline")
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return load_theirs(folder)


def as_theirs(arguments):
    """diffusers' sizes are of an area, and its latents torch's."""
    import torch

    image = arguments["image"]
    image = torch.tensor(image) if isinstance(image, np.ndarray) else image
    return arguments | {"image": image, "max_area": 64 * 96, "_auto_resize": False}


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_latents_equal_diffusers(case, ours, theirs):
    arguments = {"image": LATENTS, "seed": 7} | CALL | CASES[case]
    want = run_theirs(theirs, **as_theirs(arguments), output_type="latent")
    latents = ours(**arguments, **LATENT).images
    assert latents.shape == want.shape and error(latents, want) < 1e-4
    if arguments["image"] is not None:
        other = ours(**arguments | {"image": -LATENTS}, **LATENT).images
        assert error(other, want) > 1e-2, "the picture is of no effect"


@pytest.mark.torch
def test_a_picture_is_encoded_by_the_posterior_s_mean(ours, theirs):
    """Pixels of 64 x 48, the array's own size."""
    numbers = np.random.default_rng(1).random((64, 48, 3), np.float32)
    arguments = {"prompt": "a", "image": numbers, "seed": 7} | CALL
    picture = Image.fromarray((numbers * 255).round().astype(np.uint8))
    want = run_theirs(theirs, **as_theirs(arguments | {"image": picture}), output_type="np")
    arguments["image"] = np.asarray(picture)
    assert np.abs(ours(**arguments, output_type="np", progress=False).images - want).max() <= 1 / 255


def test_pictures_take_the_nearest_size_that_the_model_was_trained_with(ours):
    assert len(REFERENCE_SIZES) == 17 and (672, 1568) in REFERENCE_SIZES and (1568, 672) in REFERENCE_SIZES
    for size, want in (((640, 480), (880, 1184)), ((300, 300), (1024, 1024)), ((100, 900), (1568, 672))):
        options = Options(prompt="", image=Image.new("RGB", size), output_type="latent", **CALL)
        assert ours.request(options).source.pixels.shape == (1, *want, 3)


@pytest.mark.torch
def test_a_planned_call_equals_diffusers_with_masks(ours, theirs):
    """Reference tokens are dense like text, wherever they lie: diffusers has them last."""
    arguments = {"prompt": PROMPTS[0], "image": LATENTS, "seed": 7} | CALL
    plan = random_plan(ours.setting(**arguments, output_type="latent"), 1)
    (layer, *_), positions = plan.setting.layers, [*range(16), *range(16 + 24, 16 + 24 + 15)]
    assert (layer.num_text, layer.num_visual, plan.setting.num_reference) == (31, 24, 15)
    layouts = [SimpleNamespace(text=positions)] * len(plan.setting.layers)
    far, output = planned_error(ours, theirs, arguments, plan, as_theirs(arguments), layouts)
    assert far < 1e-4 < error(output.images, ours(**arguments, **LATENT).images)


def test_a_plan_is_for_pictures_of_one_shape(ours, tmp_path):
    call = {"prompt": "a", "image": LATENTS} | CALL
    random_plan(ours.setting(**call, output_type="latent"), 1).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    short = {name: value for name, value in call.items() if name != "max_sequence_length"}
    assert ours(**short, plan=plan, **LATENT).metadata["max_sequence_length"] == 16
    with pytest.raises(PlanError, match="num_reference is 15 in the plan and 0 in the call: pass a picture of this"):
        ours(**short | {"image": None}, plan=plan, **LATENT)


def test_devices_share_a_batch_and_no_tokens(ours, folder):
    two = Pipeline.from_pretrained(folder, devices=2)
    call = {"prompt": PROMPTS, "image": LATENTS} | CALL
    assert error(two(**call, **LATENT).images, ours(**call, **LATENT).images) < 1e-5
    with pytest.raises(ValueError, match="devices do not share the tokens of image=, but 2 of them would"):
        two(**call | {"prompt": "a"}, **LATENT)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image": LATENTS, "strength": 0.5}, "strength=0.5 is for other FLUX.1 models: Kontext starts from noise"),
        ({"image": LATENTS, "mask_image": LATENTS}, "(?s)mask_image=.* is for other FLUX.1 models"),
        ({"image": LATENTS[:, :, :5]}, "whose sides must be multiples of 2"),
    ],
)
def test_calls_that_kontext_has_not_are_refused(arguments, message, ours):
    with pytest.raises(ValueError, match=message):
        ours("a", **CALL, **LATENT, **arguments)


@pytest.mark.parametrize("budget", [{"delta": 0.5, "windows": (2,), "tiles": (8, 8)}, {"speedup": 2.0}])
def test_plans_are_calibrated_with_a_picture(budget, ours):
    plan = calibrate(ours, PROMPTS, image=LATENTS, **CALL, **budget, progress=False)
    assert plan.setting.num_reference == 15 and (plan.choices[1:].any() or len(plan.nodes) == 3)
    other = calibrate(ours, PROMPTS, image=-LATENTS, **CALL, **budget, progress=False)
    records = [each.calibration or each.step_calibration for each in (plan, other)]
    assert records[0].prompts_sha256 != records[1].prompts_sha256
    assert ours("a", image=LATENTS, plan=plan, **LATENT).metadata["num_nodes"] == len(plan.nodes)
