"""The trained video model in the box: small, whole, read by diffusers, and it draws captions that it never saw."""

import json
from importlib import import_module

import numpy as np
import pytest
from checkout import ROOT
from safetensors import safe_open

from dfa2_jax import Pipeline
from dfa2_jax.demo.box import VIDEOS

pytest.importorskip("toy", reason="toy/ is beside the tests in a checkout alone")
scenes = import_module("toy.video_scenes")
checker = import_module("toy.video_checker")
model = import_module("toy.video_model")

pytestmark = pytest.mark.checkout

OPTIONS = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 20, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_pretrained(VIDEOS.folder)


def test_it_is_whole_and_small():
    files = [path for path in VIDEOS.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in VIDEOS.folder.rglob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}, path  # noqa: SIM118


def test_prompts_of_the_demo_are_held_out():
    held_out = {scene.caption for scene in scenes.held_out()}
    every = {scenes.moving_scene(numbers).caption for numbers in scenes.number_table()[::7]}
    shown, learned = (
        path.read_text().splitlines() for path in (VIDEOS.prompts, ROOT / "assets/video_calibration_prompts.txt")
    )
    assert set(shown) <= held_out and not set(learned) & held_out
    assert {word for caption in learned for word in caption.split()} <= {word for one in every for word in one.split()}


def test_it_draws_what_it_never_saw(pipeline):
    """In little what `python -m toy.video_evaluate` does with 200 captions."""
    some = scenes.held_out()[100:104]
    call = OPTIONS | {"seed": list(range(len(some))), "output_type": "np", "progress": False}
    videos = pipeline([scene.caption for scene in some], **call).frames

    def mean_scores(asked):
        return np.mean([checker.score(video, scene) for video, scene in zip(videos, asked, strict=True)], axis=0)

    background, colour, shape, direction, speed, _ = mean_scores(some)
    assert background == colour == direction == speed == 1 and shape > 0.8
    # Other captions' scores say that the checker looks.
    assert mean_scores(some[1:] + some[:1])[1:].max() < 0.6


@pytest.mark.torch
def test_diffusers_reads_it_and_draws_the_same(pipeline):
    import torch
    from diffusers import CogVideoXPipeline

    arguments = OPTIONS | {"num_inference_steps": 5}
    prompt = "a red circle moves slowly left on a blue background"
    theirs = CogVideoXPipeline.from_pretrained(VIDEOS.folder, local_files_only=True).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    call = arguments | {"max_sequence_length": model.T5_LENGTH, "output_type": "np"}
    want = theirs(prompt, generator=torch.Generator().manual_seed(3), **call).frames
    ours = pipeline(prompt, seed=3, output_type="np", progress=False, **arguments).frames
    assert np.std(want) > 0.1
    np.testing.assert_allclose(ours, want, atol=1e-3)


def test_it_is_what_the_script_would_export():
    """Sizes of the folder are those that `toy.video_train` trains; its tokenizer gives the ids that it was given."""
    for name, (class_name, fields) in model.configs().items():
        config = json.loads((VIDEOS.folder / name / "config.json").read_text())
        assert class_name in (config.get("_class_name"), *config.get("architectures", []))
        left_out = {"tie_word_embeddings"} | ({"scaling_factor"} if name == "vae" else set())
        wanted = {field: value for field, value in fields.items() if field not in left_out}
        differ = {field: (config.get(field), value) for field, value in wanted.items() if config.get(field) != value}
        assert not differ, name
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(VIDEOS.folder / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=model.PAD, length=model.T5_LENGTH)
    chosen = scenes.split()[2][:20]
    captions = [scenes.moving_scene(numbers).caption for numbers in scenes.number_table()[chosen]]
    ids = [tokenizer.encode(caption).ids for caption in captions]
    np.testing.assert_array_equal(ids, model.token_ids(scenes.number_table()[chosen]))
