"""Image to image and inpainting, against diffusers' pipelines of both."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from PIL import Image
from pipeline_cases import PROMPTS, error, load_theirs, planned_error, random_plan, run_theirs

from dfa2_jax import Pipeline, Plan, PlanError, calibrate, cli
from dfa2_jax.io.images import read_metadata
from dfa2_jax.options import Options
from dfa2_jax.plan.suffix import from_step

LATENT = {"output_type": "latent", "progress": False}
CALL = {"height": 64, "width": 96, "num_inference_steps": 8, "max_sequence_length": 16}


def picture(seed, size=(100, 70)):
    """Its sides are no multiples of a token's pixels: it is resized."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def mask(size=(100, 70)):
    return Image.fromarray((np.indices(size[::-1]).sum(0) % 60 < 25).astype(np.uint8) * 255)


CASES = {
    "sd3": ("tiny_sd3", {"strength": 0.6, "guidance_scale": 5.0, "negative_prompt": "blurry"}),
    "sd35, weak": ("tiny_sd35", {"strength": 0.15, "guidance_scale": 1.0}),
    "sd35, whole": ("tiny_sd35", {"strength": 1.0}),
    "sd35, batch": ("tiny_sd35", {"prompt": PROMPTS, "num_images_per_prompt": 2}),
    "dev": ("tiny_flux_dev", {"strength": 0.7, "guidance_scale": 3.5}),
    "dev, seeds": (
        "tiny_flux_dev",
        {"prompt": PROMPTS, "seed": [3, 4], "image": [picture(1), picture(2)], "guidance_scale": 3.5},
    ),
    "schnell": ("tiny_flux_schnell", {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 0.0}),
    "dev, true cfg": ("tiny_flux_dev", {"true_cfg_scale": 3.0, "negative_prompt": "blurry", "guidance_scale": 3.5}),
}
MASKED = ("sd3", "sd35, whole", "sd35, batch", "dev", "dev, seeds", "schnell")


@pytest.fixture(scope="module")
def theirs(request):
    """(folder fixture name, kind of pipeline) -> diffusers' pipeline in float32."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    kinds = {"image": AutoPipelineForImage2Image, "mask": AutoPipelineForInpainting}
    whole = cache(lambda name: load_theirs(request.getfixturevalue(name)))

    @cache
    def load(name, kind):
        pipeline = kinds[kind].from_pipe(whole(name))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.mark.torch
@pytest.mark.parametrize("kind, case", [("image", case) for case in CASES] + [("mask", case) for case in MASKED])
def test_latents_and_images_equal_diffusers(kind, case, pipelines, theirs):
    name, arguments = CASES[case]
    arguments = {"prompt": PROMPTS[0], "image": picture(0), "seed": 7, **CALL, **arguments}
    if kind == "mask":
        arguments["mask_image"] = mask()
    ours, reference = pipelines(name), theirs(name, kind)
    latents = ours(**arguments, **LATENT).images
    want = run_theirs(reference, **arguments, output_type="latent")
    assert latents.shape == want.shape and error(latents, want) < 1e-4
    plain = {key: value for key, value in arguments.items() if key not in ("image", "mask_image", "strength")}
    assert error(latents, ours(**plain, **LATENT).images) > 1e-2, "the picture is of no effect"
    images = ours(**arguments, output_type="np", progress=False).images
    if kind == "mask" and name != "tiny_flux_dev":  # there diffusers 0.42 decodes without the autoencoder's shift
        want = decoded(reference.vae, want) if want.ndim == 4 else run_theirs(reference, **arguments, output_type="np")
    else:
        want = run_theirs(reference, **arguments, output_type="np")
    assert np.abs(images - want).max() <= 1 / 255


def decoded(vae, latents):
    import torch

    with torch.no_grad():
        images = vae.decode(torch.tensor(latents) / vae.config.scaling_factor + vae.config.shift_factor)[0]
    return (images / 2 + 0.5).clip(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.torch
@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("name, kind", [("tiny_sd35", "mask"), ("tiny_flux_dev", "image")])
def test_a_plan_applies_to_the_steps_that_run(name, kind, strength, pipelines, theirs):
    """The first of them in full; the rest equals diffusers with masks and reuse written out in torch."""
    ours, reference = pipelines(name), theirs(name, kind)
    arguments = {"prompt": PROMPTS[0], "seed": 7, "image": picture(0), "strength": strength, "guidance_scale": 3.5}
    arguments |= CALL | ({"mask_image": mask()} if kind == "mask" else {})
    plan = random_plan(ours.setting(**arguments, output_type="latent"), 3)
    far, output = planned_error(ours, reference, arguments, plan)
    assert far < 1e-4 < error(output.images, ours(**arguments, **LATENT).images)
    assert output.metadata["plan"] == plan.digest and output.metadata["num_inference_steps"] == 8
    cut = from_step(plan, 8 - (runs := 4 if strength == 0.4 else 8))
    assert output.metadata["num_nodes"] == runs and output.metadata["density"] == pytest.approx(cut.density())


def test_pictures_masks_and_strengths_are_data(pipelines, compilations):
    ours, call = pipelines("tiny_flux_dev"), CALL | LATENT
    plan = random_plan(ours.setting(prompt="", **CALL, output_type="latent"), 1)
    jax.clear_caches()  # whatever other tests compiled
    for options in ({}, {"mask_image": mask()}, {"plan": plan}):
        ours("", image=picture(0), **call, **options)
        assert compilations
        compilations.clear()
        ours("a ring", image=picture(1), strength=0.2, **call, **options)
        if "mask_image" in options:
            ours("", image=picture(1), strength=1.0, **call, mask_image=mask((64, 64)))
        assert not compilations


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_other_solvers_begin_without_a_history(scheduler, pipelines):
    """The first two steps are of a first one's order; later ones are the whole schedule's."""
    ours, call = pipelines("tiny_sd35"), CALL | {"prompt": "a", "scheduler": scheduler, "output_type": "latent"}
    whole, late = ours.prepare(Options(**call)), ours.prepare(Options(**call, image=picture(0), strength=0.75))
    assert len(late.schedule.timesteps) == 6
    rows, want = late.inputs.solver.coefficients[:6], whole.inputs.solver.coefficients[2:8]
    np.testing.assert_allclose(rows[2:], want[2:], rtol=1e-6)
    assert (rows[0] == 0).sum() > (want[0] == 0).sum()
    np.testing.assert_array_equal(late.inputs.timesteps[:6], whole.inputs.timesteps[2:8])
    assert np.isfinite(ours(**call, image=picture(0), strength=0.75, progress=False).images).all()


def test_what_is_outside_of_the_mask_stays(pipelines):
    ours = pipelines("tiny_sd35")
    latents = (
        np.random.default_rng(0).standard_normal((1, 16, 8, 12)).astype(np.float32)[:, : ours.family.latent_channels]
    )
    kept = np.zeros((64, 96), np.uint8)
    kept[:, 40:] = 255
    made = ours("a", image=latents, mask_image=Image.fromarray(kept), strength=0.9, **CALL, **LATENT).images
    np.testing.assert_array_equal(made[..., :5], latents[..., :5])
    assert error(made[..., 5:], latents[..., 5:]) > 0.1


@pytest.mark.parametrize("first", [5, 6])
def test_a_step_plan_is_cut_at_a_node_or_between_two(first, pipelines):
    setting = pipelines("tiny_sd35").setting(prompt="", **CALL | {"num_inference_steps": 12}, output_type="latent")
    coefficients = np.random.default_rng(0).uniform(-0.2, 0, (5, 2))
    coefficients[0, 1] = 0
    plan = replace(Plan.full(setting, (0, 2, 5, 9, 11)), coefficients=coefficients)
    assert from_step(plan, 0) is plan
    with pytest.raises(PlanError, match="the plan is of 12 steps, and the picture starts after 12"):
        from_step(plan, 12)
    suffix, sigmas = from_step(plan, first), np.float32(setting.sigmas)
    assert suffix.nodes == (0, 9 - first, 11 - first) and suffix.setting.sigmas == setting.sigmas[first:]
    np.testing.assert_allclose(suffix.coefficients[0], [sigmas[9] - sigmas[first], 0], rtol=1e-6)
    np.testing.assert_array_equal(suffix.coefficients[1:], coefficients[3:])


def test_the_command_starts_from_a_file_and_makes_it_again(tiny_sd35, tmp_path, capsys):
    picture(0).save(tmp_path / "photo.png")
    mask().save(tmp_path / "mask.png")
    words = ["--image", str(tmp_path / "photo.png"), "--mask-image", str(tmp_path / "mask.png"), "--strength", "0.5"]
    words += ["--height", "64", "--width", "64", "--steps", "4", "--max-sequence-length", "16", "--quiet"]
    assert cli.main(["sample", str(tiny_sd35), "--prompt", "a", *words, "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").iterdir()
    made = read_metadata(path)
    assert made["strength"] == 0.5 and made["source"]["image"] == str(tmp_path / "photo.png") and made["image"] == 0
    with Image.open(path) as image:
        assert "Denoising strength: 0.5" in image.text["parameters"]
    again = ["again", str(path), "--out", str(tmp_path / "again.png"), "--quiet"]
    assert cli.main(again) == 0
    (tmp_path / "again.png").unlink()
    picture(1).save(tmp_path / "photo.png")
    assert cli.main(again) == 2 and "its source is not as it was" in capsys.readouterr().err
    (tmp_path / "mask.png").unlink()
    assert cli.main(again) == 2 and "which is no file that is there" in capsys.readouterr().err


def test_arrays_tensors_and_files_are_the_picture(pipelines, tmp_path):
    import torch

    ours, small = pipelines("tiny_sd35"), picture(0).resize((96, 64))
    small.save(tmp_path / "photo.png")
    numbers = np.asarray(small)
    forms = [small, numbers, np.float32(numbers) / 255, torch.tensor(numbers).permute(2, 0, 1) / 255,
             str(tmp_path / "photo.png"), [numbers]]  # fmt: skip
    digests = {
        ours.request(Options(prompt="", image=form, **CALL, output_type="latent")).source.digest for form in forms
    }
    assert len(digests) == 1
    black = [mask((96, 64)), np.asarray(mask((96, 64))), np.asarray(mask((96, 64)))[..., None] / 255]
    options = {"prompt": "", "image": small, "output_type": "latent"} | CALL
    masks = [ours.request(Options(**options, mask_image=form)).source.mask for form in black]
    assert masks[0].shape == (1, 64, 96) and all((x == masks[0]).all() for x in masks)


@pytest.mark.torch
def test_a_coloured_mask_is_read_as_diffusers_does(pipelines):
    from diffusers.image_processor import VaeImageProcessor

    options = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    want = VaeImageProcessor(vae_scale_factor=16, **options).preprocess(picture(5), height=64, width=96)
    call = {"prompt": "", "image": picture(0), "mask_image": picture(5), "output_type": "latent"} | CALL
    mask = pipelines("tiny_sd35").request(Options(**call)).source.mask
    assert 0.1 < mask.mean() < 0.9
    np.testing.assert_array_equal(mask, want[:, 0].numpy())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strength": 0.5}, "strength=0.5 goes with image, which is None"),
        ({"mask_image": mask()}, "mask_image=.* goes with image, which is None"),
        ({"image": picture(0), "strength": 1.5}, "strength=1.5 must be a number from 0 to 1"),
        ({"image": picture(0), "strength": -0.1}, "strength=-0.1 must be a number"),
        ({"image": picture(0), "strength": 0.0}, "strength=0.0 leaves none of 8 steps: 0.125 leaves one"),
        ({"image": []}, "image is an empty list"),
        ({"image": "nowhere.png"}, "image='nowhere.png' is not there"),
        ({"image": __file__}, "is no picture"),
        (
            {"image": np.zeros((64, 64, 3))},
            r"image is an array of \[64, 64, 3\], and the call's images are \[64, 96, 3\]",
        ),
        ({"image": np.full((64, 96, 3), 2.0)}, "image goes from 2 to 2: numbers must be from 0 to 1"),
        ({"image": np.full((64, 96, 3), np.nan)}, "not finite"),
        ({"image": [picture(0), picture(1)]}, "image holds 2 pictures for a batch of 1 images"),
        ({"image": np.zeros((1, 16, 4, 4), np.float32)}, "latents .* of another size"),
    ],
)
def test_bad_pictures_are_named(arguments, message, pipelines):
    ours = pipelines("tiny_sd35")
    with pytest.raises(ValueError, match=message):
        ours("a", **CALL, **LATENT, **arguments)


@pytest.mark.parametrize("name", ["tiny_cogvideox_2b", "tiny_hunyuanvideo"])
def test_videos_start_from_no_picture(name, pipelines):
    with pytest.raises(ValueError, match="image=.* is for image models: this one makes videos"):
        pipelines(name).request(Options(prompt="", image=picture(0), height=32, width=48, output_type="latent"))


def test_devices_share_a_picture(pipelines, tiny_sd35):
    call = CALL | LATENT | {"prompt": PROMPTS, "image": picture(0), "mask_image": mask()}
    many = Pipeline.from_pretrained(tiny_sd35, devices=2)(**call).images
    assert error(many, pipelines("tiny_sd35")(**call).images) < 1e-5


@pytest.mark.parametrize("masked", [{}, {"mask_image": mask()}])
def test_plans_are_calibrated_from_noise(masked, pipelines):
    with pytest.raises(ValueError, match="image= is for FLUX.1-Fill and -Kontext: leave it out"):
        calibrate(pipelines("tiny_sd35"), PROMPTS, image=picture(0), **masked, **CALL, progress=False)
