"""The quality report of videos: scores frame by frame, their motion, and what the page shows of them."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageSequence
from skimage.metrics import structural_similarity

from dfa2_jax import Pipeline, Plan, cli, quality_report
from dfa2_jax.options import Options
from dfa2_jax.plan.steps import adams_coefficients
from dfa2_jax.report import clips, metrics, report
from dfa2_jax.report.report import limit_steps
from dfa2_jax.report.sampler import Sampler
from dfa2_jax.report.table import Judges, Line, Report, Shot
from dfa2_jax.sampling.solvers.ddim import ScaledMultistep

PROMPTS, SEEDS, FRAMES = ["a red ring", "a <star>"], [0, 7], 9
CALL = {"height": 32, "width": 48, "num_frames": FRAMES, "num_inference_steps": 2}
JUDGES = Judges({"psnr": metrics.psnr, "ssim": metrics.ssim}, {})
FACTS = {"arguments": {"num_frames": FRAMES, "fps": 8}}


@pytest.fixture(scope="module")
def plans(pipelines):
    """Random heads at the second step, with arrows of both orders; and a plan of one step of two."""
    full = Plan.full(pipelines("tiny_cogvideox_5b").setting(prompt="", **CALL))
    generator, heads = np.random.default_rng(0), full
    for layer in range(full.choices.shape[1]):
        for head, method in enumerate(generator.permutation(["full", "cached", "arrow(1/4)", "arrow(1/4, time)"])):
            heads = heads.with_method(1, layer, head, str(method))
    return {"heads": heads, "steps": Plan.full(full.setting, (0,))}


@pytest.fixture(scope="module")
def made(plans, pipelines, tiny_cogvideox_5b):
    """Without the other dtype, another implementation and the heads, whose programs take 12 s to compile.

    The pipeline is the one that other tests have.
    """
    pipeline = pipelines("tiny_cogvideox_5b")

    def left_out(table, *_):
        for line in (table.rounded, table.reordered[table.other_dtype]):
            line.left_out = "for its time"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "watch", lambda *args, **options: None)
        patch.setattr(report, "_fill_others", left_out)
        patch.setattr(Sampler, "other_implementation", None)
        patch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pipeline)
        return quality_report(tiny_cogvideox_5b, plans, PROMPTS, seed=SEEDS, batch=2, progress=False)


@pytest.fixture(scope="module")
def rows(made):
    return {row["name"]: row for row in json.loads(json.dumps(made.content()))["rows"]}


@pytest.fixture(scope="module")
def videos(pipelines, plans):
    """By line, the videos of the second prompt as the pipeline gives them."""
    pipeline = pipelines("tiny_cogvideox_5b")
    call = {"prompt": [PROMPTS[1]] * 2, "seed": SEEDS, "output_type": "np", "progress": False} | CALL
    many = pipeline.prepare(Options(**call | {"num_inference_steps": limit_steps(2)}))
    sigmas = np.asarray(many.schedule.sigmas)
    solver = ScaledMultistep.planned(sigmas, adams_coefficients(sigmas))
    many = replace(many, inputs=replace(many.inputs, solver=solver))
    changes = {"dense": {}, "1 steps of DDIM": {"num_inference_steps": 1}} | {
        name: {"plan": plan} for name, plan in plans.items()
    }
    sampled = {name: pipeline(**call | change).frames for name, change in changes.items()}
    return sampled | {"limit": many.images(many.run())}


def psnr_of(video, exact):
    """Every frame's, as textbooks have it."""
    return -10 * np.log10(np.mean((np.float64(video) - exact) ** 2, axis=(1, 2, 3)))


def ssim_of(video, exact):
    pairs = zip(np.float64(video), np.float64(exact), strict=True)
    return np.array([structural_similarity(a, b, data_range=1.0, channel_axis=-1) for a, b in pairs])


def motion_of(video, exact):
    return np.abs(np.diff(np.float64(video), axis=0) - np.diff(np.float64(exact), axis=0)).mean()


def noisy_videos(scale=0.05):
    generator = np.random.default_rng(0)
    exact = generator.uniform(0.3, 0.7, (2, FRAMES, 16, 24, 3)).astype(np.float32)
    noise = generator.standard_normal(exact.shape) * scale * np.arange(1, FRAMES + 1)[:, None, None, None]
    return (exact + noise).astype(np.float32), exact


# Scores


def test_lines_are_those_of_a_family_of_videos(made):
    """CogVideoX's DPM++ 2M draws noise, and stands beside no plan of steps."""
    assert [(line.name, line.kind) for line in made.lines] == [
        ("dense", "dense"), ("float32, sums reordered", "floor"), ("bfloat16 against float32", "floor"),
        ("bfloat16, sums reordered", "floor"), ("heads", "plan"), ("steps", "plan"), ("1 steps of DDIM", "solver"),
        ("another seed", "ceiling"),
    ]  # fmt: skip
    assert made.content()["limit_steps"] == 8
    assert (
        made.content()["arguments"] | {"num_frames": 9, "fps": 8, "use_dynamic_cfg": False}
        == (made.content()["arguments"])
    )


@pytest.mark.parametrize("name", ["heads", "steps", "1 steps of DDIM"])
def test_scores_are_those_of_the_pipelines_videos(name, rows, videos):
    scores = rows[name]["metrics"]
    for number, (video, exact, limit) in enumerate(zip(videos[name], videos["dense"], videos["limit"], strict=True)):
        for metric, wanted, within in (
            ("psnr", psnr_of(video, exact), 0.01),
            ("ssim", ssim_of(video, exact), 1e-3),
            ("limit_psnr", psnr_of(video, limit), 0.01),
        ):
            assert wanted.std() > within, "frames differ"
            np.testing.assert_allclose(scores[metric]["frames"][1][number], wanted, atol=within)
            assert scores[metric]["values"][1][number] == pytest.approx(wanted.mean(), abs=within)
        got = scores["temporal_difference"]
        assert got["values"][1][number] == pytest.approx(motion_of(video, exact), rel=1e-3)
        assert "frames" not in got and "worst_frame" not in got


def test_the_worst_frame_is_named_in_the_numbers(rows):
    for name, metric in (("heads", "psnr"), ("heads", "ssim"), ("steps", "psnr"), ("another seed", "ssim")):
        numbers = rows[name]["metrics"][metric]
        frames, worst = np.array(numbers["frames"]), numbers["worst_frame"]
        assert frames.shape == (len(PROMPTS), len(SEEDS), FRAMES)
        assert worst["value"] == frames.min() < numbers["worst"]
        assert frames[worst["prompt"], SEEDS.index(worst["seed"]), worst["frame"]] == worst["value"]
    largest = Line("p", "plan", frames={"lpips": [[0.1, 0.4], [0.3, 0.2]]}).numbers_by_frame("lpips", (5, 6))
    assert largest["worst_frame"] == {"value": 0.4, "prompt": 0, "seed": 5, "frame": 1}


def test_scores_of_frames_are_plain_numpys():
    videos, exact = noisy_videos()
    line = Line("p", "plan")
    line.add(JUDGES, [Shot("a", 0), Shot("b", 0)], videos, exact, limit=exact[::-1])
    for number in range(2):
        wanted = psnr_of(videos[number], exact[number])
        np.testing.assert_allclose(line.frames["psnr"][number], wanted, atol=1e-3)
        assert line.scores["psnr"][number] == pytest.approx(wanted.mean(), abs=1e-3)
        assert line.scores["psnr"][number] != pytest.approx(
            -10 * np.log10(np.mean((np.float64(videos[number]) - exact[number]) ** 2)), abs=0.5
        ), "the mean is of dB, not of squares"
        np.testing.assert_allclose(line.frames["ssim"][number], ssim_of(videos[number], exact[number]), atol=1e-6)
        np.testing.assert_allclose(
            line.frames["limit_psnr"][number], psnr_of(videos[number], exact[1 - number]), atol=1e-3
        )
        wanted = motion_of(videos[number], exact[number])
        assert line.scores["temporal_difference"][number] == pytest.approx(wanted, rel=1e-5)


def test_an_equal_frame_counts_as_an_equal_image():
    videos, exact = noisy_videos()
    videos[:, 0] = exact[:, 0]
    line = Line("p", "plan")
    line.add(JUDGES, [Shot("a", 0), Shot("b", 0)], videos, exact)
    wanted = (metrics.EQUAL_PSNR + psnr_of(videos[0, 1:], exact[0, 1:]).sum()) / FRAMES
    assert line.scores["psnr"][0] == pytest.approx(wanted, abs=1e-3)


def test_temporal_difference_is_of_motion_alone():
    _, (still, _) = noisy_videos()
    moved = np.stack([np.roll(still[0], frame, axis=1) for frame in range(FRAMES)])
    flicker = np.where(np.arange(FRAMES)[:, None, None, None] % 2, 0.1, 0).astype(np.float32)
    assert metrics.temporal_difference(moved, moved) == 0
    assert metrics.temporal_difference(moved + np.float32(0.1), moved) == pytest.approx(0, abs=1e-7)
    assert metrics.temporal_difference(moved + flicker, moved) == pytest.approx(0.1, rel=1e-5)
    assert metrics.temporal_difference(moved[:1] + np.float32(0.1), moved[:1]) == 0


def test_images_have_no_frames_in_their_numbers():
    videos, exact = noisy_videos()
    line = Line("p", "plan")
    line.add(JUDGES, [Shot("a", 0), Shot("b", 0)], videos[:, 0], exact[:, 0])
    dense = Line("dense", "dense", seconds=[1.0])
    made = Report((dense, replace(line, kind="solver", seconds=[1.0])), ("a", "b"), (0,), {}, None, {})
    (_, numbers) = made.content()["rows"]
    assert {*numbers["metrics"]} == {"psnr", "ssim"} and made.noun == "image"
    assert all({*of} == {"mean", "worst", "interval", "values"} for of in numbers["metrics"].values())
    assert line.worst[0].image.shape == (16, 24, 3) and not line.worst[0].frames


# The gate


def test_limits_act_on_means_of_videos():
    videos, exact = noisy_videos()
    line = Line("p", "plan")
    line.add(JUDGES, [Shot("a", 0), Shot("b", 0)], videos, exact)
    mean, lowest = line.mean("psnr"), np.min(line.frames["psnr"])
    assert lowest < mean - 3
    kept, missed = (
        Report((Line("dense", "dense"), line), ("a", "b"), (0,), {"psnr": limit}, None, FACTS).failures
        for limit in (mean - 1, mean + 1)
    )
    assert kept == []
    assert len(missed) == 1 and re.search(r"plan p: mean PSNR .* is below the limit .* \(worst video", missed[0])
    videos[0, 4, 3, 3] = np.nan
    line.add(JUDGES, [Shot("a", 0), Shot("b", 0)], videos, exact)
    made = Report((Line("dense", "dense"), line), ("a", "b"), (0, 1), {}, None, FACTS)
    assert made.failures == ["plan p: 1 of 4 videos are not finite"]


def test_motion_takes_part_in_the_distance_to_the_noise():
    exact = {"psnr": [60.0], "ssim": [1.0]}
    floor = Line("float16", "floor", scores=exact | {"temporal_difference": [0.001]})
    calm, restless = (Line("p", "plan", scores=exact | {"temporal_difference": [moved]}) for moved in (0.0005, 0.002))
    made = Report((Line("dense", "dense"), floor, calm, restless), ("a",), (0,), {}, None, FACTS)
    assert made.distances(calm)[0]["within"] and not made.distances(restless)[0]["within"]
    assert made.distances(restless)[0]["temporal_difference"] == pytest.approx(0.001)


def test_the_command_speaks_of_videos(made, plans, tiny_cogvideox_5b, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dfa2_jax.commands.report.quality_report", lambda *_, **__: made)
    plans["heads"].save(tmp_path / "heads.json")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = [f"--plan={tmp_path / 'heads.json'}", f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path}"]
    assert cli.main(["report", str(tiny_cogvideox_5b), *options]) == 0
    assert "and its videos keep a mean PSNR of" in capsys.readouterr().out


# Calls


def test_other_calls_of_a_plan_make_videos_as_it_does(plans, pipelines):
    """Without the plan, they have its frames and its guidance."""
    pipeline = pipelines("tiny_cogvideox_5b")
    dynamic = pipeline.setting(prompt="", **CALL | {"num_frames": 5}, use_dynamic_cfg=True)
    sampler = Sampler(pipeline, {"plan": Plan.full(dynamic)}, 1)
    shots = [Shot("a", 3)]
    call = sampler.prepare(shots)
    for other in (sampler.prepare(shots, **sampler.without_plan(call)), sampler.limit(shots, call)):
        assert other.options.plan is None and other.options.use_dynamic_cfg and not other.options.progress
        assert other.request.num_frames == 5 and other.seeds == [3]
        assert len({*np.asarray(other.inputs.guidance.scale)[:2]}) == 2
    assert sampler.limit(shots, call).request.steps == limit_steps(2)


# The page


def clips_of(html):
    """Animations of the page."""
    return [base64.b64decode(data) for data in re.findall('src="data:image/webp;base64,([^"]*)"', html)]


def read(data):
    """Frames of an animation, in [0, 1], and milliseconds of each."""
    with Image.open(io.BytesIO(data)) as file:
        frames = [
            (np.asarray(frame.convert("RGB")) / 255, frame.info["duration"]) for frame in ImageSequence.Iterator(file)
        ]
    return np.stack([frame for frame, _ in frames]), [milliseconds for _, milliseconds in frames]


def test_the_page_shows_the_worst_videos_beside_dense_ones(made, rows, tmp_path):
    html = made.save(tmp_path).read_text(encoding="utf-8")
    pairs = [pair for line in made.of_kind("plan") for pair in line.worst]
    shown = clips_of(html)
    assert len(shown) == len(pairs) == 2 * 4 and "image/png" not in html
    for pair, data in zip(pairs, shown, strict=True):
        assert data == clips.webp(clips.side_by_side(pair.image, pair.exact)[0], 8.0)
        worst = min(pair.frames["psnr"])
        assert f"worst PSNR {worst:.2f} at frame {pair.frames['psnr'].index(worst)}" in html
    worst = rows["heads"]["metrics"]["psnr"]["worst_frame"]
    for words in (
        "9 frames at 8 a second", "each video against", f"worst frame {worst['value']:.2f}", "the worst video.",
        "of PSNR it is the mean of dB", "<h2>Every video</h2>", "4 videos", "temporal difference", "a &lt;star&gt;",
    ):  # fmt: skip
        assert words in html
    assert "worst image" not in html


def test_frames_on_the_page_are_small_and_few():
    frames = np.random.default_rng(0).random((130, 34, 500, 3), np.float32)
    small = clips.small(frames)
    assert clips.stride(64) == 1 and clips.stride(130) == 3
    assert small.shape == (44, 11, 166, 3)
    np.testing.assert_allclose(small[1], frames[3, :33, :498].reshape(11, 3, 166, 3, 3).mean((1, 3)), rtol=1e-6)
    assert clips.small(frames[:, :2]).shape == (44, 1, 166, 3), "a side shorter than a square"
    np.testing.assert_array_equal(clips.small(frames[:2, :32, :48]), frames[:2, :32, :48])


def test_a_difference_fills_the_scale():
    videos, exact = noisy_videos(0.001)
    panels, factor = clips.side_by_side(videos[0], exact[0])
    difference = np.abs(videos[0] - exact[0])
    assert factor == pytest.approx(1 / difference.max())
    assert panels[..., -24:, :].max() == 255 and panels.shape == (FRAMES, 16, 72, 3)
    np.testing.assert_allclose(panels[..., -24:, :] / 255, difference * factor, atol=1 / 255)
    np.testing.assert_allclose(panels[..., :24, :] / 255, exact[0], atol=1 / 255)


def test_an_animation_keeps_frames_and_time():
    shades = np.linspace(0.1, 0.9, FRAMES)
    frames = np.broadcast_to(shades[:, None, None, None], (FRAMES, 32, 48, 3))
    shown, milliseconds = read(clips.webp(np.round(frames * 255).astype(np.uint8), 16.0))
    assert shown.shape == frames.shape
    np.testing.assert_allclose(shown.mean((1, 2, 3)), shades, atol=0.02)
    assert sum(milliseconds) == pytest.approx(FRAMES * 1000 / 16, abs=1)
