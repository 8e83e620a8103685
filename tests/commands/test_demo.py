"""`dfa2 demo` as a user runs it, and what it ships: a model, a plan that fits it, and the words that it knows."""

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from checkout import ROOT
from PIL import Image

from dfa2_jax import Output, Pipeline, Plan, cli, convert_checkpoint
from dfa2_jax.commands import demo
from dfa2_jax.commands.start import read_prompts
from dfa2_jax.demo.box import FINGERPRINT, FOLDER, PLAN, PROMPTS, known_words
from dfa2_jax.demo.picture import Pair
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.images import read_metadata
from dfa2_jax.pipeline.output import metadata


@pytest.fixture(scope="module")
def boxed():
    return Pipeline.from_pretrained(FOLDER)


@pytest.fixture
def calls(boxed, cache, monkeypatch):
    """The options of every call: sampling takes no time, and the image of call number i has the gray value 10 * i."""
    asked = []

    def sample(self, options, phase):
        asked.append(options)
        request = self.request(options)
        pixels = np.full((1, request.height, request.width, 3), len(asked) * 10 / 255, np.float32)
        made = metadata(self, options, request) | {"density": 0.25}
        return Output(pixels, [0], {"denoise": float(len(asked)), "per_step": 0.0}, made)

    monkeypatch.setattr(Pipeline, "sample", sample)
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, **options: boxed)
    return asked


def test_each_prompt_is_made_dense_and_by_the_plan_and_all_are_drawn(calls, tmp_path, capsys):
    out, plan = tmp_path / "out", Plan.load(PLAN)
    names = ["1-a-red-ring-dense.png", "1-a-red-ring-plan.png", "2-a-star-dense.png", "2-a-star-plan.png"]
    for _ in range(2):  # the second run replaces what the first one made
        calls.clear()
        assert cli.main(["demo", "--out", str(out), "--prompt", "a red ring", "--prompt", "a star"]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines() == [str(out / name) for name in (*names, "demo.png")]
        assert sorted(file.name for file in out.iterdir()) == [*names, "demo.png"]
    assert [(options.prompt, options.plan) for options in calls] == [
        ("a red ring", None), ("a red ring", plan), ("a star", None), ("a star", plan),
    ]  # fmt: skip
    said = printed.err.splitlines()[-2:]
    assert "which runs 10 of 20 steps, an image took 3.0 s instead of 2.0 s." in said[0]
    assert "a PSNR of 28.1 dB or better" in said[0] and said[1] == demo.NEXT
    made = [read_metadata(out / name) for name in names]
    assert [one.get("plan_file") for one in made] == [None, str(PLAN)] * 2 and made[1]["plan"] == plan.digest
    with Image.open(out / "demo.png") as picture:
        pixels = np.asarray(picture)
    for value in (10, 20, 30, 40):
        assert (pixels == value).all(-1).sum() > 250**2, f"the picture lacks image {value // 10}"
    assert (pixels == 40).all(-1).sum() > 3 * 250**2  # and both differences, 4 times 10


def test_by_default_the_prompts_are_the_shipped_ones_and_the_folder_has_a_name(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0 and (tmp_path / "dfa2-demo" / "demo.png").is_file()
    assert [options.prompt for options in calls[::2]] == PROMPTS.read_text().splitlines()


def test_an_interruption_leaves_what_is_finished(calls, tmp_path, monkeypatch, capsys):
    sample = Pipeline.sample

    def interrupted(self, *args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, *args)

    monkeypatch.setattr(Pipeline, "sample", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path), "--prompt", "a", "--prompt", "star"]) == 130
    names = ["1-a-dense.png", "1-a-plan.png", "2-star-dense.png"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
    assert {*names, "demo.png"} <= {file.name for file in tmp_path.iterdir()}


def test_a_file_in_place_of_the_folder_is_refused(calls, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2 and not calls
    assert "file is a file: choose a folder" in capsys.readouterr().err


def test_psnr_is_of_the_pixels():
    black, gray = (Image.new("RGB", (4, 4), (value,) * 3) for value in (0, 51))
    assert Pair("", (black, gray), (0, 0)).psnr() == pytest.approx(20 * np.log10(5))
    assert Pair("", (gray, gray), (0, 0)).psnr() == np.inf


def test_the_shipped_plan_fits_the_shipped_model_and_keeps_its_images(boxed, no_shape_checks):
    plan = Plan.load(PLAN)
    assert boxed.fingerprint == plan.setting.weights == FINGERPRINT and not plan.edited
    assert len(plan.nodes) == 10 and plan.heads_are_full
    prompt = read_prompts(PROMPTS)[0]
    calls = demo.both(boxed, plan, prompt)
    dense, planned = (boxed.request(options) for options in calls.values())
    assert calls["dense"].plan is None and dense == planned
    assert dense.guidance_scale == plan.step_calibration.guidance_scale
    exact, kept = (boxed.sample(replace(options, progress=False)).images[0] for options in calls.values())
    assert 42 < Pair(prompt, (exact, kept), (0, 0)).psnr() < 60


def test_words_that_the_model_in_the_box_never_saw_are_named(boxed, calls, tmp_path, monkeypatch, caplog):
    """Another model's prompts may have any words."""
    size = ["--height", "64", "--width", "64", "--quiet", "--out", str(tmp_path)]
    words = ["--prompt", "a red cat of a cat", "--prompt", "a Red star", "--negative-prompt", "blurry"]
    assert cli.main(["sample", "folder", *words, *size]) == 0
    (record,) = caplog.records
    assert "never saw 'cat', 'Red', 'blurry': " in record.message and "triangle" in record.message
    assert cli.main(["demo", "--out", str(tmp_path), "--prompt", "a dog"]) == 0
    assert len(caplog.records) == 2 and "never saw 'dog': " in caplog.text
    assert cli.main(["sample", "folder", "--prompt", "a red star", *size]) == 0
    monkeypatch.setattr(boxed, "fingerprint", "another model's")
    assert cli.main(["sample", "folder", *words, *size]) == 0
    assert len(caplog.records) == 2


def test_a_converted_folder_keeps_the_fingerprint(tmp_path):
    assert open_checkpoint(convert_checkpoint(FOLDER, tmp_path / "new", "bfloat16")).fingerprint == FINGERPRINT


@pytest.mark.checkout
def test_its_words_are_those_of_the_training_captions():
    assert len(known_words()) == 30  # docs/toy-model.md
    assert known_words() == {*pytest.importorskip("toy.model").words()}


@pytest.mark.checkout
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_takes_a_version_of_cuda_and_refuses_others():
    def planned(*words):
        return subprocess.run(["make", "-nB", "demo", *words], cwd=ROOT, capture_output=True, text=True)

    assert "jax[cuda" not in planned().stdout and '"jax[cuda13]"' in planned("CUDA=13").stdout
    assert "torch" not in (ROOT / "requirements" / "demo-jax0.10.2.txt").read_text()
    refused = planned("CUDA=11")
    assert refused.returncode == 2 and "CUDA=11 must be 12 or 13" in refused.stderr
