"""Defaults and fallbacks of diffusers' pipelines, by a table: what reaches the text encoders, and what a call takes."""

import inspect

import numpy as np
import pytest
from pipeline_cases import load_theirs

from dfa2_jax.options import Options
from dfa2_jax.pipeline.pipeline import Pipeline

CALL = {"prompt": "a large red circle", "height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 16}
NEGATIVE = {"negative_prompt": "a blue star"}
SD3_CASES = [
    {},
    {"prompt_2": "a ring", "prompt_3": "a cross"},
    {"prompt_2": "", "prompt_3": ""},
    NEGATIVE,
    NEGATIVE | {"negative_prompt_2": ""},
    NEGATIVE | {"negative_prompt_3": ""},
    NEGATIVE | {"negative_prompt_2": "a ring", "negative_prompt_3": "a cross"},
    {"negative_prompt": "", "negative_prompt_2": "a ring"},
    {"negative_prompt_3": "a cross"},
    NEGATIVE | {"clip_skip": 1},
]
FLUX_CASES = [{"prompt_2": ""}, {"prompt_2": "a ring"}]
FLUX_TRUE_CFG = [{}, {"negative_prompt_2": ""}, {"negative_prompt_2": "a cross"}]


@pytest.fixture(scope="module", params=["tiny_sd35", "tiny_flux_dev", "tiny_flux_schnell"])
def both(request, pipelines):
    return request.param, pipelines(request.param), load_theirs(request.getfixturevalue(request.param))


def assert_equal(ours, theirs):
    theirs = theirs.detach().float().numpy()
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.torch
def test_prompts_fall_back_as_in_diffusers(both):
    name, ours, theirs = both
    if name != "tiny_sd35":
        return check_flux(ours, theirs)
    for case in SD3_CASES:
        made = ours.prepare(Options(**CALL | {"guidance_scale": 5.0} | case)).inputs.conditions
        encoded = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 16, "prompt": CALL["prompt"]} | case
        text, negative, pooled, negative_pooled = theirs.encode_prompt(**encoded)
        for mine, sides in ((made.text, (negative, text)), (made.pooled, (negative_pooled, pooled))):
            for got, want in zip(mine, sides, strict=True):
                assert_equal(got, want[0])


def check_flux(ours, theirs):
    for case in FLUX_CASES:
        made = ours.prepare(Options(**CALL | case)).inputs.conditions
        text, pooled, _ = theirs.encode_prompt(prompt=CALL["prompt"], max_sequence_length=16, **case)
        assert_equal(made.text, text)
        assert_equal(made.pooled, pooled)
    for case in FLUX_TRUE_CFG:
        made = ours.prepare(Options(**CALL | NEGATIVE | {"true_cfg_scale": 2.0} | case)).inputs.conditions
        text, pooled, _ = theirs.encode_prompt(
            prompt=NEGATIVE["negative_prompt"], prompt_2=case.get("negative_prompt_2"), max_sequence_length=16
        )
        assert_equal(made.text[0], text[0])
        assert_equal(made.pooled[0], pooled[0])


SCHNELL = {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}
"""Where ours differ from the pipeline's: the model card's, since 28 steps would be seven times the work for no gain."""


@pytest.mark.torch
def test_what_a_call_takes_by_default_is_what_diffusers_takes(both):
    name, ours, theirs = both
    said = {key: value.default for key, value in inspect.signature(type(theirs).__call__).parameters.items()}
    request = ours.prepare(Options(prompt="red", height=64, width=64)).request
    taken = {
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "max_sequence_length": request.length,
    }
    assert taken == (SCHNELL if name == "tiny_flux_schnell" else {key: said[key] for key in taken})
    options, renamed = Options(), {"clip_skip", "negative_prompt", "latents", "sigmas", "num_images_per_prompt"}
    for key in renamed & {*said}:
        assert getattr(options, key) == said[key], key
    for key in ("true_cfg_scale", *(f"skip_layer_guidance_{part}" for part in ("scale", "start", "stop"))):
        assert getattr(options, key) == said.get(key, getattr(options, key)), key


def test_a_flux_without_guidance_is_schnell_by_its_scheduler(tiny_flux_schnell, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(tiny_flux_schnell, tmp_path / "tuned")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": True}))
    assert Pipeline.from_pretrained(folder).family.defaults.num_inference_steps == 28
