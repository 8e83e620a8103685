"""After the first call of a shape nothing compiles: prompts, seeds, guidance and step counts are data."""

import jax
import numpy as np
import pytest

from dfa2_jax import Method, Pipeline, Plan

PROMPTS = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "")]


@pytest.mark.parametrize(
    ("name", "first", "others"),
    [
        ("tiny_sd35", {"guidance_scale": 7.0}, [{"guidance_scale": g} for g in (1.5, 3.0, 15.0)]),
        ("tiny_sd35", {"guidance_scale": 1.0}, [{"guidance_scale": g} for g in (0.0, 0.5)]),
        (
            "tiny_sd35",
            {"skip_guidance_layers": [1]},
            [
                {"skip_guidance_layers": [0, 3], "skip_layer_guidance_scale": 1.0},
                {"skip_guidance_layers": [2], "skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.9},
            ],
        ),
        ("tiny_sd35", {"clip_skip": None}, [{"clip_skip": 1}, {"negative_prompt": "blurry"}]),
        ("tiny_flux_dev", {"guidance_scale": 3.5}, [{"guidance_scale": g} for g in (1.0, 2.0, 30.0)]),
        (
            "tiny_flux_dev",
            {"true_cfg_scale": 2.0, "negative_prompt": "x"},
            [{"true_cfg_scale": 5.5, "negative_prompt": "a blurry photo"}],
        ),
        ("tiny_flux_schnell", {}, [{"sigmas": [1.0, 0.4]}]),
    ],
)
def test_nothing_compiles_twice(name, first, others, request, compilations):
    pipeline = Pipeline.from_pretrained(request.getfixturevalue(name))
    common = {"height": 64, "width": 64, "max_sequence_length": 16}
    jax.clear_caches()
    pipeline(PROMPTS[0], num_inference_steps=2, progress=False, **common, **first)
    assert compilations, "the listener hears no compilation: the test shows nothing"
    compilations.clear()
    for seed, prompt in enumerate(PROMPTS):
        pipeline(prompt, num_inference_steps=1 + seed, seed=seed, progress=bool(seed % 2), **common, **first)
    for steps in (9, 64):
        pipeline(PROMPTS[0], num_inference_steps=steps, progress=False, **common, **first)
    for other in others:
        pipeline(PROMPTS[0], **common, **first | other, **({} if "sigmas" in other else {"num_inference_steps": 3}))
    assert compilations == []


@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_dev"])
def test_plans_are_data_too(name, request, compilations):
    """Four plans, prompts, seeds, guidance values and step counts, of one program beside the dense one."""
    pipeline = Pipeline.from_pretrained(request.getfixturevalue(name))
    common = {"height": 64, "width": 64, "max_sequence_length": 16}
    methods = Method("full"), Method("cached"), Method("arrow(1/4)")

    def run(number):
        arguments = common | {"num_inference_steps": 2 + 20 * number, "guidance_scale": 2.0 + number}
        full = Plan.full(pipeline.setting(prompt="", **arguments))
        choices = np.random.default_rng(number).integers(3, size=full.choices.shape, dtype=np.uint8)
        choices[0] = 0
        plan = Plan(full.setting, methods, choices)
        pipeline(PROMPTS[number], seed=number, plan=plan, progress=bool(number % 2), **arguments)
        pipeline(PROMPTS[number], seed=number, progress=False, **arguments)

    jax.clear_caches()
    run(0)
    assert compilations
    compilations.clear()
    for number in range(4):
        run(number)
    assert compilations == []


@pytest.mark.parametrize("scheduler", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_of_videos_nothing_compiles_twice(scheduler, tiny_cogvideox_5b, compilations):
    """Seeds, step counts, dynamic guidance and plans, of a solver each; with a bar and without."""
    pipeline = Pipeline.from_pretrained(tiny_cogvideox_5b)
    common = {"height": 32, "width": 48, "num_frames": 17, "scheduler": scheduler}
    methods = Method("full"), Method("cached"), Method("arrow(1/4)")

    def run(number):
        arguments = common | {"num_inference_steps": 2 + 12 * number, "guidance_scale": 2.0 + number}
        arguments |= {"use_dynamic_cfg": bool(number % 2), "seed": number, "progress": bool(number % 2)}
        full = Plan.full(pipeline.setting(prompt="", **arguments))
        choices = np.random.default_rng(number).integers(3, size=full.choices.shape, dtype=np.uint8)
        choices[0] = 0
        for plan in (None, Plan(full.setting, methods, choices)):
            pipeline(PROMPTS[number], plan=plan, **arguments)

    jax.clear_caches()
    run(0)
    assert compilations, "the listener hears no compilation: the test shows nothing"
    compilations.clear()
    for number in (1, 2):
        run(number)
    assert compilations == []
