"""The quality report: its table, the noise floor, time, and the two files."""

import gc
import json
import time
import weakref
from dataclasses import replace
from html.parser import HTMLParser
from statistics import median
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from report_cases import PROMPTS, SIZE, noisy, three_plans

from dfa2_jax import Pipeline, Plan, quality_report
from dfa2_jax.commands.report import verdict
from dfa2_jax.options import Options
from dfa2_jax.plan.steps import adams_coefficients
from dfa2_jax.report import metrics, report
from dfa2_jax.report import table as report_table
from dfa2_jax.report.report import limit_steps
from dfa2_jax.report.table import Judges, Line, Report, Shot
from dfa2_jax.sampling.solvers.flow_euler import FlowMultistep


@pytest.fixture(scope="module")
def plans(tiny_sd35):
    return three_plans(tiny_sd35)


@pytest.fixture(scope="module")
def made(plans, tiny_sd35):
    opened, alive, load = [], [], Pipeline.from_pretrained

    def watched(*args, **options):
        gc.collect()
        alive.append(sum(pipeline() is not None for pipeline in opened))
        pipeline = load(*args, **options)
        opened.append(weakref.ref(pipeline))
        return pipeline

    limits = {"ssim": 0.97, "psnr": 20.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "from_pretrained", watched)
        report = quality_report(tiny_sd35, plans, PROMPTS[:3], seed=[0, 7], batch=4, limits=limits, progress=False)
    assert alive == [0, 0], "two sets of weights were in memory at once"
    return report


def line_of(made, name):
    """The line of this name in the report's table."""
    return next(line for line in made.lines if line.name == name)


def test_lines_are_the_plans_between_noise_and_another_seed(made):
    names = ["dense", "float32, sums reordered", "bfloat16 against float32", "bfloat16, sums reordered"]
    assert [line.name for line in made.lines] == [*names, "full", "arrows", "broken", "another seed"]
    psnr = {line.name: line.mean("psnr") for line in made.lines[1:]}
    assert metrics.EQUAL_PSNR > psnr["float32, sums reordered"] > 120
    assert 70 > psnr["bfloat16 against float32"] > psnr["arrows"]
    assert 70 > psnr["bfloat16, sums reordered"] > psnr["broken"] > psnr["another seed"]
    assert all(len(line.scores["ssim"]) == 6 for line in made.lines[1:])


def test_8_bits_stand_beside_dense_with_their_own_plans(tiny_sd35, tmp_path):
    """Their lines are the images that a pipeline of that dtype makes."""
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 16, "guidance_scale": 2.0}
    small = Pipeline.from_pretrained(tiny_sd35, dtype="int8")
    plain = Plan.full(Pipeline.from_pretrained(tiny_sd35).setting(prompt="", **options))
    plan = Plan.full(small.setting(prompt="", **options)).with_method(1, None, [0], "cached")
    plans = {"plain": plain, "small": plan}
    asked = {"precisions": ["int8"], "guidance_scale": 2.0, "progress": False}
    made = quality_report(tiny_sd35, plans, PROMPTS[:1], **asked, quick=True)
    assert [(line.name, line.kind) for line in made.lines] == [
        ("dense", "dense"), ("int8", "precision"), ("small", "plan"), ("plain", "plan"),
    ]  # fmt: skip
    call = {"prompt": PROMPTS[0], "output_type": "np", "progress": False} | options
    (exact,) = Pipeline.from_pretrained(tiny_sd35)(**call).images
    for name, more in (("int8", {}), ("small", {"plan": plan})):
        (image,) = small(**call | more).images
        assert line_of(made, name).mean("psnr") == pytest.approx(metrics.psnr(image, exact), abs=0.01)
        assert 20 < line_of(made, name).mean("psnr") < 70
    rows = {row["name"]: row for row in made.content()["rows"]}
    assert len(rows["int8"]["seconds_per_step"]["rounds"]) == len(rows["dense"]["seconds_per_step"]["rounds"])
    assert rows["int8"]["speedup"] > 0 and "predicted_speedup" not in rows["small"]
    assert "int8" in made.save(tmp_path).read_text()
    with pytest.raises(ValueError, match="All plans are of int8: give one of dtype=None, too, or dtype='int8'"):
        quality_report(tiny_sd35, {"small": plan}, PROMPTS[:1], precisions=["int8"], progress=False)
    with pytest.raises(ValueError, match="precisions has 'int8': different ones of float8, int8, int8_weights, not"):
        quality_report(tiny_sd35, plans, PROMPTS[:1], precisions=["int8"], dtype="int8", progress=False)


def test_a_plan_of_steps_stands_beside_solvers_in_its_time(tiny_sd35, pipelines, tmp_path):
    pipeline = pipelines("tiny_sd35")
    options = {"height": 64, "width": 64, "num_inference_steps": 6, "max_sequence_length": 16, "guidance_scale": 2.0}
    every = Plan.full(pipeline.setting(prompt="", **options))
    plans = {"steps": Plan.full(every.setting, (0, 2, 4)), "heads": every.with_method(1, 0, 0, "cached")}
    made = quality_report(tiny_sd35, plans, PROMPTS[:1], guidance_scale=2.0, progress=False)
    solvers = [line.name for line in made.of_kind("solver")]
    assert solvers == ["3 steps of Euler's", "3 steps of DPM++ 2M"]
    rows = {row["name"]: row for row in made.content()["rows"]}
    sampled = {"prompt": PROMPTS[0], "output_type": "np", "progress": False} | options
    (dense,) = pipeline(**sampled).images
    many = pipeline.prepare(Options(**sampled | {"num_inference_steps": limit_steps(6)}))
    solver = FlowMultistep.moving(adams_coefficients(many.schedule.sigmas))
    many = replace(many, inputs=replace(many.inputs, solver=solver))
    (limit,) = many.images(many.run())
    for name, changes in {
        "dense": {},
        "steps": {"plan": plans["steps"]},
        "3 steps of Euler's": {"num_inference_steps": 3},
        "3 steps of DPM++ 2M": {"num_inference_steps": 3, "scheduler": "DPMSolverMultistepScheduler"},
    }.items():
        (image,) = pipeline(**sampled | changes).images
        scores = rows[name]["metrics"]
        assert scores["limit_psnr"]["mean"] == pytest.approx(metrics.psnr(image, limit), abs=0.01)
        if name != "dense":
            assert scores["psnr"]["mean"] == pytest.approx(metrics.psnr(image, dense), abs=0.01)
            assert rows[name]["speedup"] > 1.2
    assert made.content()["limit_steps"] == 24
    assert "limit_psnr" not in rows["another seed"]["metrics"] and "dB to the limit of many steps" in verdict(made)
    assert "3 steps of DPM++ 2M" in made.save(tmp_path).read_text()


def test_a_full_plan_is_within_the_noise_and_the_others_are_not(made):
    for name, within in (("full", True), ("arrows", False), ("broken", False)):
        distances = made.distances(line_of(made, name))
        assert [distance["within"] for distance in distances] == [within] * 3
        assert all((distance["psnr"] <= 0) == within for distance in distances)
    floor, arrows = line_of(made, "bfloat16 against float32"), line_of(made, "arrows")
    assert made.distances(arrows)[1]["psnr"] == pytest.approx(floor.mean("psnr") - arrows.mean("psnr"))


def test_images_are_those_that_the_pipeline_gives(made, plans, pipelines):
    pipeline = pipelines("tiny_sd35")
    arguments = {"prompt": [PROMPTS[1]] * 4, "seed": [0, 7, 1, 2], "output_type": "np", "progress": False}
    exact = pipeline(**arguments, **SIZE).images[1]
    image = pipeline(**arguments, plan=plans["broken"]).images[1]
    scores = made.content()["rows"][-2]["metrics"]
    assert scores["psnr"]["values"][1][1] == pytest.approx(metrics.psnr(image, exact), abs=0.01)
    assert scores["ssim"]["values"][1][1] == pytest.approx(metrics.ssim(image, exact), abs=1e-4)


def test_the_five_worst_pairs_are_kept(made):
    broken = line_of(made, "broken")
    assert [pair.scores["ssim"] for pair in broken.worst] == sorted(broken.scores["ssim"])[:5]
    for pair in broken.worst:
        assert pair.scores["ssim"] == pytest.approx(metrics.ssim(pair.image, pair.exact))


def test_heads_are_told_by_layer(made, plans):
    full = plans["full"]
    assert made.masses.text.shape == full.choices.shape
    no_text = [layer.num_text == 0 for layer in full.setting.layers]
    np.testing.assert_array_equal(made.masses.text.max((0, 2)) == 0, no_text)
    assert made.masses.half_windows == (24 // 8,)


def test_the_first_call_of_a_program_is_not_timed(no_shape_checks):
    compiled = []

    def program(plan, *, implementation):
        def run(state, start, stop):
            if (program := (plan is None, implementation)) not in compiled:
                compiled.append(program)
                time.sleep(0.5)
            return SimpleNamespace(latents=np.full(1, stop))

        return run, None

    sampler = report.Sampler(None, {}, 1)
    call = SimpleNamespace(inputs=None, program=program, num_steps=lambda plan: 3)
    for implementation in (None, "reference", None):
        tokens, seconds = sampler.denoise(call, None, implementation)
        assert tokens == [3] and seconds < 0.1


def test_time_is_of_interleaved_rounds(made):
    dense, full = made.lines[0], line_of(made, "full")
    assert len(dense.seconds) == len(full.seconds) == report.ROUNDS
    assert made.speedup(full) == median(a / b for a, b in zip(dense.seconds, full.seconds, strict=True))


def test_predicted_speedup_is_that_of_the_kept_pairs(made, plans):
    share = made.facts["attention_share"]
    assert 0 < share < 1
    for content in made.content()["rows"]:
        if content["kind"] == "plan":
            kept = plans[content["name"]].density()
            assert content["density"]["exact"] == kept
            assert content["predicted_speedup"] == pytest.approx(1 / (1 - share * (1 - kept)))


class Page(HTMLParser):
    """Collects tags that never close, references to elsewhere, and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.references, self.pictures, self.text = [], [], 0, ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name, value in attrs:
            self.pictures += value.startswith("data:image/png;base64,") if name == "src" else 0
            if name in ("src", "href", "srcset", "action") and not value.startswith("data:"):
                self.references.append(value)
        if tag in ("script", "link", "iframe"):
            self.references.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_says_what_the_numbers_say(made, tmp_path):
    path = made.save(tmp_path / "new" / "out")
    page = Page(html := path.read_text(encoding="utf-8"))
    assert not page.open and not page.references and "url(" not in html
    assert page.pictures == 3 * 5 * 3 + 3
    for words in (
        *PROMPTS[:3],
        "within this noise",
        "outside of this noise",
        "times as fast",
    ):
        assert words in page.text
    assert "<b>座" not in html
    assert f"mean SSIM {line_of(made, 'broken').mean('ssim'):.4f} is below the limit 0.97" in page.text
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json"]


def test_the_numbers_come_back_from_json(made, tmp_path, plans, tiny_sd35):
    made.save(tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(made.content()))
    assert read["prompts"] == PROMPTS[:3] and read["seeds"] == [0, 7]
    assert read["model"]["fingerprint"] == plans["full"].setting.weights
    assert {line["name"]: line["digest"] for line in read["rows"] if "digest" in line} == {
        name: plan.digest for name, plan in plans.items()
    }
    arrows = next(line for line in read["rows"] if line["name"] == "arrows")
    assert arrows["density"] == {"exact": plans["arrows"].density(), "tiles": plans["arrows"].density((128, 128))}
    low, high = arrows["metrics"]["psnr"]["interval"]
    assert low <= arrows["metrics"]["psnr"]["mean"] <= high
    assert arrows["metrics"]["psnr"]["worst"] == np.min(arrows["metrics"]["psnr"]["values"])
    assert np.shape(read["heads"]["near"]) == (1, *plans["full"].choices.shape)


def test_files_appear_together_or_not_at_all(made, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(report_table, "json", SimpleNamespace(dumps=fail))  # when the page is written already
    with pytest.raises(OSError, match="No space"):
        made.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_not_finite_fails_any_gate():
    image, near = noisy(0)
    bad = near.copy()
    bad[3, 4] = np.nan
    judges = Judges({"psnr": metrics.psnr, "ssim": metrics.ssim}, {})
    judged = Line("bad", "plan")
    judged.add(judges, [Shot("a", 0), Shot("b", 0)], np.stack([near, bad]), np.stack([image, image]))
    made = Report((Line("dense", "dense"), judged), ("a", "b"), (0,), {}, None, {})
    assert made.failures == ["plan bad: 1 of 2 images are not finite"]


def test_a_floor_that_does_not_fit_in_memory_is_left_out():
    floor, plan = Line("float32", "floor"), Line("plan", "plan")
    with report.fitting(floor):
        raise MemoryError("27 GB of scores")
    assert floor.left_out == "does not fit in memory: 27 GB of scores"
    with pytest.raises(MemoryError), report.fitting(plan):
        raise MemoryError
    with pytest.raises(jax.errors.JaxRuntimeError), report.fitting(Line("float32", "floor")):
        raise jax.errors.JaxRuntimeError("INTERNAL: another fault")


def test_a_16_bit_report_has_the_same_rows(plans, tiny_sd35, tmp_path, monkeypatch):
    """One prompt, so no interval; the floor of its own dtype is the one that a plan of all full meets."""
    monkeypatch.setattr(report, "watch", lambda *args, **options: None)  # its program takes 10 s to compile
    options = {"seed": [0, 1, 2, 3], "batch": 4, "dtype": "bfloat16", "progress": False}
    made = quality_report(tiny_sd35, {"full": plans["full"]}, PROMPTS[3:], **options)
    names = [line.name for line in made.lines]
    assert names[1:4] == ["float32, sums reordered", "bfloat16 against float32", "bfloat16, sums reordered"]
    assert made.distances(line_of(made, "full"))[2]["within"]
    psnr = {name: line_of(made, name).mean("psnr") for name in names[1:4]}
    assert psnr["float32, sums reordered"] > 120 > psnr["bfloat16 against float32"]
    content = made.content()
    assert content["rows"][4]["metrics"]["psnr"]["interval"] is None
    assert "an interval of the mean is not defined" in Page(made.save(tmp_path).read_text(encoding="utf-8")).text
