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
from dfa2_jax.demo.box import IMAGES, VIDEOS, known_words
from dfa2_jax.demo.picture import Pair
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.images import read_metadata
from dfa2_jax.pipeline.output import metadata


@pytest.fixture(scope="module")
def boxed():
    return Pipeline.from_pretrained(IMAGES.folder)


@pytest.fixture(scope="module")
def boxed_video():
    return Pipeline.from_pretrained(VIDEOS.folder)


@pytest.fixture
def calls(boxed, boxed_video, cache, monkeypatch):
    """The options of every call: sampling takes no time. The image of call number i has the gray value 10 * i, and so
    has the first of two frames; the second is black."""
    asked, pipelines = [], {IMAGES.folder: boxed, VIDEOS.folder: boxed_video}

    def sample(self, options, phase):
        asked.append(options)
        request = self.request(options)
        shape, timings = (1, request.height, request.width, 3), {"denoise": float(len(asked)), "per_step": 0.0}
        made = metadata(self, options, request) | {"density": 0.25}
        if self is boxed_video:
            gray = Image.new("RGB", shape[2:0:-1], (10 * len(asked),) * 3)
            return Output(None, [0], timings, made, frames=[[gray, Image.new("RGB", gray.size)]])
        return Output(np.full(shape, len(asked) * 10 / 255, np.float32), [0], timings, made)

    monkeypatch.setattr(Pipeline, "sample", sample)
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, **options: pipelines.get(folder, boxed))
    return asked


def test_each_prompt_is_made_dense_and_by_the_plan_and_all_are_drawn(calls, tmp_path, capsys):
    out, plan = tmp_path / "out", Plan.load(IMAGES.plan)
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
    assert "which runs 10 of 20 steps, each image took 3.0 s instead of 2.0 s." in said[0]
    assert "a PSNR of 28.1 dB or better" in said[0] and said[1] == demo.NEXT
    made = [read_metadata(out / name) for name in names]
    assert [one.get("plan_file") for one in made] == [None, str(IMAGES.plan)] * 2 and made[1]["plan"] == plan.digest
    with Image.open(out / "demo.png") as picture:
        pixels = np.asarray(picture)
    for value in (10, 20, 30, 40):
        assert (pixels == value).all(-1).sum() > 250**2, f"the picture lacks image {value // 10}"
    assert (pixels == 40).all(-1).sum() > 3 * 250**2  # and both differences, 4 times 10


def test_videos_are_drawn_in_motion(calls, tmp_path, capsys):
    assert cli.main(["demo", "--video", "--out", str(tmp_path), "--prompt", "a red ring moves"]) == 0
    names = ["1-a-red-ring-moves-dense.webp", "1-a-red-ring-moves-plan.webp", "demo.webp"]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(tmp_path / name) for name in names]
    assert "each video took 2.0 s instead of 1.0 s." in printed.err
    with Image.open(tmp_path / "demo.webp") as picture:
        for frame, values in ((0, (10, 20, 40)), (1, (0, 0, 0))):  # dense, by the plan, 4 times the difference
            picture.seek(frame)
            pixels = np.asarray(picture.convert("RGB")).astype(int)
            for value in values:
                near = (np.abs(pixels - value) <= 2).all(-1).sum()
                assert near > values.count(value) * 250**2, f"frame {frame} lacks an image of {value}"


def test_by_default_the_prompts_are_the_shipped_ones_and_the_folder_has_a_name(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0 and (tmp_path / "dfa2-demo" / "demo.png").is_file()
    assert [options.prompt for options in calls[::2]] == IMAGES.prompts.read_text().splitlines()


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
    assert Pair("", ([black], [gray]), (0, 0)).psnr() == pytest.approx(20 * np.log10(5))
    assert Pair("", ([black] * 4, [gray, *[black] * 3]), (0, 0)).psnr() == pytest.approx(20 * np.log10(10))
    assert Pair("", ([gray], [gray]), (0, 0)).psnr() == np.inf


@pytest.mark.parametrize("kind", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_the_shipped_plan_fits_the_shipped_model_and_keeps_its_images(kind, boxed, boxed_video, no_shape_checks):
    pipeline, plan = boxed_video if kind is VIDEOS else boxed, Plan.load(kind.plan)
    assert pipeline.fingerprint == plan.setting.weights == kind.fingerprint and not plan.edited
    assert len(plan.nodes) == 10 and plan.heads_are_full
    prompt = read_prompts(kind.prompts)[0]
    calls = demo.both(pipeline, plan, prompt)
    dense, planned = (pipeline.request(options) for options in calls.values())
    assert calls["dense"].plan is None and dense == planned
    assert dense.guidance_scale == plan.step_calibration.guidance_scale
    outputs = [pipeline.sample(replace(options, progress=False)) for options in calls.values()]
    assert 35 < demo.pair_of(prompt, *outputs).psnr() < 60


def test_words_that_the_model_in_the_box_never_saw_are_named(boxed, calls, tmp_path, monkeypatch, caplog):
    """Another model's prompts may have any words."""
    size = ["--height", "64", "--width", "64", "--quiet", "--out", str(tmp_path)]
    words = ["--prompt", "a red cat of a cat", "--prompt", "a Red star", "--negative-prompt", "blurry"]
    assert cli.main(["sample", "folder", *words, *size]) == 0
    (record,) = caplog.records
    assert "never saw 'cat', 'Red', 'blurry': " in record.message and "triangle" in record.message
    assert cli.main(["demo", "--out", str(tmp_path), "--prompt", "a dog"]) == 0
    assert len(caplog.records) == 2 and "never saw 'dog': " in caplog.text
    assert cli.main(["demo", "--video", "--out", str(tmp_path), "--prompt", "a small ring moves"]) == 0
    assert len(caplog.records) == 3 and "never saw 'small': " in caplog.text and "quickly" in caplog.text
    assert cli.main(["sample", "folder", "--prompt", "a red star", *size]) == 0
    monkeypatch.setattr(boxed, "fingerprint", "another model's")
    assert cli.main(["sample", "folder", *words, *size]) == 0
    assert len(caplog.records) == 3


@pytest.mark.parametrize("kind", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_a_converted_folder_keeps_the_fingerprint(kind, tmp_path):
    converted = open_checkpoint(convert_checkpoint(kind.folder, tmp_path / "new", "bfloat16"))
    assert converted.fingerprint == kind.fingerprint


@pytest.mark.checkout
@pytest.mark.parametrize(
    ("kind", "words", "count"), [(IMAGES, "toy.model", 30), (VIDEOS, "toy.video_scenes", 25)], ids=["images", "videos"]
)
def test_its_words_are_those_of_the_training_captions(kind, words, count):
    assert len(known_words(kind)) == count  # docs/toy-model.md
    assert known_words(kind) == {*pytest.importorskip(words).words()}


@pytest.mark.checkout
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_takes_a_version_of_cuda_and_refuses_others():
    def planned(*words):
        return subprocess.run(["make", "-nB", "demo", *words], cwd=ROOT, capture_output=True, text=True)

    assert "jax[cuda" not in planned().stdout and '"jax[cuda13]"' in planned("CUDA=13").stdout
    assert "torch" not in (ROOT / "requirements" / "demo-jax0.10.2.txt").read_text()
    refused = planned("CUDA=11")
    assert refused.returncode == 2 and "CUDA=11 must be 12 or 13" in refused.stderr
