"""`dfa2 demo` as a user runs it, and what it ships: a model, a plan that fits it, and the words that it knows."""

import shutil
import subprocess

import numpy as np
import pytest
from checkout import ROOT
from PIL import Image

from dfa2_jax import Output, Pipeline, Plan, cli, convert_checkpoint
from dfa2_jax.commands import demo
from dfa2_jax.commands.start import read_prompts
from dfa2_jax.demo.box import FINGERPRINT, FOLDER, PLAN, PROMPTS, known_words
from dfa2_jax.demo.picture import Pair
from dfa2_jax.io.images import read_metadata
from dfa2_jax.pipeline.output import metadata

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def small(tiny_sd35, tmp_path_factory):
    """A model of random weights, and a plan of two steps that leaves much out."""
    pipeline, path = Pipeline.from_pretrained(tiny_sd35), tmp_path_factory.mktemp("plan") / "plan.json"
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}
    plan = Plan.full(pipeline.setting(prompt=PROMPT, **size)).with_method(1, None, None, "cached")
    plan.save(path)
    return pipeline, plan, path, size


@pytest.fixture
def arguments(small, tmp_path, cache, monkeypatch):
    pipeline, _, path, _ = small
    monkeypatch.setattr(demo, "PLAN", path)
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder: pipeline)
    return ["demo", "--out", str(tmp_path / "out")]


def test_each_prompt_is_made_dense_and_by_the_plan_and_all_are_drawn(small, arguments, tmp_path, capsys):
    pipeline, plan, path, size = small
    out = tmp_path / "out"
    names = [
        f"{n}-{slug}-{kind}.png" for n, slug in ((1, "a-large-red-circle"), (2, "star")) for kind in ("dense", "plan")
    ]
    for _ in range(2):  # the second run replaces what the first one made
        assert cli.main([*arguments, "--prompt", PROMPT, "--prompt", "star"]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines() == [str(out / name) for name in (*names, "demo.png")]
        assert sorted(file.name for file in out.iterdir()) == [*names, "demo.png"]
    last = printed.err.splitlines()[-2:]
    assert f"with {plan.density():.0%} of the query-key pairs" in last[0] and last[1] == demo.NEXT

    images = [np.asarray(Image.open(out / name)) for name in names]
    for image, settings in zip(images, [size, {"plan": plan}], strict=False):
        (by_hand,) = pipeline(PROMPT, **settings, progress=False).images
        np.testing.assert_array_equal(image, by_hand)
    assert (images[0] != images[1]).any() and (images[0] != images[2]).any()
    made = read_metadata(out / names[1])
    assert (made["plan"], made["plan_file"]) == (plan.digest, str(path)) and "plan_file" not in read_metadata(
        out / names[0]
    )
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 2 * 64 and picture.height > 3 * 64
        pixels = np.asarray(picture)
    for image in images:
        windows = np.lib.stride_tricks.sliding_window_view(pixels, image.shape)[:, :, 0]
        assert (windows[:, :, 32, 32] == image[32, 32]).all(-1).any()


def test_an_interruption_leaves_what_is_finished(arguments, tmp_path, monkeypatch, capsys):
    calls, sample = [], Pipeline.sample

    def interrupted(self, *args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args)
        return sample(self, *args)

    monkeypatch.setattr(Pipeline, "sample", interrupted)
    assert cli.main([*arguments, "--prompt", "a", "--prompt", "b"]) == 130
    names = ["1-a-dense.png", "1-a-plan.png", "2-b-dense.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [*names, "demo.png"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out" / name) for name in names]


def test_psnr_is_of_the_pixels():
    black, gray = (Image.new("RGB", (4, 4), (value,) * 3) for value in (0, 51))
    assert Pair("", (black, gray), (0, 0)).psnr() == pytest.approx(20 * np.log10(5))
    assert Pair("", (gray, gray), (0, 0)).psnr() == np.inf


@pytest.fixture(scope="module")
def boxed():
    return Pipeline.from_pretrained(FOLDER)


def test_the_shipped_plan_fits_the_shipped_model_and_keeps_its_images(boxed, no_shape_checks):
    plan = Plan.load(PLAN)
    assert boxed.fingerprint == plan.setting.weights == FINGERPRINT and not plan.edited
    assert 0.2 < plan.density() < 0.6
    prompt = read_prompts(PROMPTS)[0]
    calls = demo.both(boxed, plan, prompt)
    dense, planned = (boxed.request(options) for options in calls.values())
    assert calls["dense"].plan is None and dense == planned and dense.guidance_scale == plan.calibration.guidance_scale
    # A plan that leaves nothing out is dense sampling by the same program: one compilation.
    everything = Plan.full(boxed.prepare(calls["plan"]).setting)
    kept, exact = (
        boxed(prompt, plan=plan, guidance_scale=dense.guidance_scale, progress=False).images[0]
        for plan in (plan, everything)
    )
    assert 25 < Pair(prompt, (exact, kept), (0, 0)).psnr() < 60


def test_words_that_the_model_in_the_box_never_saw_are_named(boxed, tmp_path, cache, monkeypatch, caplog):
    """Also where its folder was converted. Another model's prompts may have any words."""

    def sample(self, options, phase):
        made = metadata(self, options, self.request(options))
        return Output(np.zeros((1, 64, 64, 3), np.float32), made["seed"], {"per_step": 0.0}, made)

    monkeypatch.setattr(Pipeline, "sample", sample)
    folder = convert_checkpoint(FOLDER, tmp_path / "converted", dtype="bfloat16")
    size = ["--height", "64", "--width", "64", "--quiet", "--out", str(tmp_path)]
    words = ["--prompt", "a red cat of a cat", "--prompt", "a Red star", "--negative-prompt", "blurry"]
    assert cli.main(["sample", str(folder), *words, *size]) == 0
    (record,) = caplog.records
    assert "never saw 'cat', 'Red', 'blurry': " in record.message and "triangle" in record.message
    assert cli.main(["sample", str(folder), "--prompt", PROMPT, *size]) == 0
    monkeypatch.setattr(Pipeline, "fingerprint", "another", raising=False)
    assert len(caplog.records) == 1


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
