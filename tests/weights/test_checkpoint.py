"""The model in the box: diffusers reads it, it draws what captions say that it never saw, and plans fit it."""

import json
from importlib import import_module

import numpy as np
import pytest
from checkout import ROOT
from safetensors import safe_open

from dfa2_jax import Pipeline, calibrate
from dfa2_jax.demo.box import IMAGES

pytest.importorskip("toy", reason="toy/ is beside the tests in a checkout alone")
scenes = import_module("toy.scenes")
checker = import_module("toy.checker")
model = import_module("toy.model")

pytestmark = pytest.mark.checkout

ASSETS = ROOT / "assets"
OPTIONS = {"height": 128, "width": 128, "num_inference_steps": 14, "guidance_scale": 4.0, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_pretrained(IMAGES.folder)


def test_it_is_whole_and_small():
    files = [path for path in IMAGES.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in IMAGES.folder.rglob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}, path  # noqa: SIM118


def test_prompts_of_the_demo_are_held_out():
    held_out = [scene.caption for scene in scenes.held_out()]
    every = {scene.caption for scene in scenes.scenes()}
    shown = IMAGES.prompts.read_text().splitlines()
    learned = (ASSETS / "calibration_prompts.txt").read_text().splitlines()
    assert set(shown) <= set(held_out) and set(learned) <= every - set(held_out)
    both = (ASSETS.parent / "benchmarks" / "prompts.txt").read_text().splitlines()
    assert set(both[:8]) <= every - set(held_out) and set(both[8:]) <= set(held_out)


def test_it_draws_what_it_never_saw(pipeline):
    """In little what `python -m toy.evaluate` does with 200 captions."""
    some = scenes.held_out()[100:108]
    prompts = [scene.caption for scene in some]
    seeds = list(range(len(some)))
    images = pipeline(prompts, seed=seeds, output_type="np", progress=False, **OPTIONS).images
    scores = np.array([checker.score(image, scene) for image, scene in zip(images, some, strict=True)])
    background, colour, _, iou = scores.mean(0)
    assert background == colour == 1 and iou > 0.85
    # Other captions' scores say that the checker looks.
    shuffled = np.array([checker.score(image, scene) for image, scene in zip(images, some[1:] + some[:1], strict=True)])
    assert shuffled[:, 3].mean() < 0.4


@pytest.mark.long
def test_a_plan_of_it_keeps_the_scene(pipeline):
    """No plan of random weights can be wrong. Here much is left out, and what was asked for is there."""
    learned = (ASSETS / "calibration_prompts.txt").read_text().splitlines()[:2]
    plan = calibrate(pipeline, learned, delta=0.1, tiles=(16, 16), progress=False, **OPTIONS)
    assert plan.density() < 0.8
    scene = scenes.held_out()[0]
    planned = {"guidance_scale": 4.0, "seed": 0, "output_type": "np", "progress": False}
    cached = plan.with_method(slice(1, None), None, None, "cached")
    for tried, close in ((plan, True), (cached, False)):
        score = checker.score(pipeline(scene.caption, plan=tried, **planned).images[0], scene)
        assert (score.iou > 0.75) == close, score


@pytest.mark.torch
def test_diffusers_reads_it_and_draws_the_same():
    import torch
    from diffusers import StableDiffusion3Pipeline

    arguments = OPTIONS | {"height": 64, "width": 64, "num_inference_steps": 6}
    prompt = "a large red circle on the left of a blue background"
    theirs = StableDiffusion3Pipeline.from_pretrained(IMAGES.folder, local_files_only=True).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    want = theirs(prompt, generator=torch.Generator().manual_seed(3), output_type="np", **arguments).images
    ours = Pipeline.from_pretrained(IMAGES.folder)(prompt, seed=3, output_type="np", progress=False, **arguments).images
    assert np.std(want) > 0.1
    np.testing.assert_allclose(ours, want, atol=1e-3)


@pytest.mark.torch
def test_it_is_what_the_script_would_export():
    """Sizes and tokenizers of the folder are those that `toy.train` trains."""
    from transformers import AutoTokenizer

    for name, (class_name, fields) in model.configs().items():
        config = json.loads((IMAGES.folder / name / "config.json").read_text())
        assert class_name in (config.get("_class_name"), *config.get("architectures", []))
        fields = {
            field: value for field, value in fields.items() if field != "tie_word_embeddings"
        }  # an encoder has none
        differ = {field: (config.get(field), value) for field, value in fields.items() if config.get(field) != value}
        assert not differ, name
    prompts = [scene.caption for scene in scenes.held_out()[:20]]
    for encoder, ours in model.token_ids(prompts).items():
        theirs = AutoTokenizer.from_pretrained(IMAGES.folder / encoder.replace("text_encoder", "tokenizer"))
        want = theirs(prompts, padding="max_length", truncation=True, max_length=ours.shape[1]).input_ids
        np.testing.assert_array_equal(ours, want, err_msg=encoder)
