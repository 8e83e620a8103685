"""`benchmarks.video_orders`: what it says of a plan and of videos, and how a run goes on."""

import json
from importlib import import_module

import numpy as np
import pytest

from dfa2_jax import Plan

pytest.importorskip("benchmarks", reason="benchmarks/ is beside the tests in a checkout alone")
video_orders = import_module("benchmarks.video_orders")

pytestmark = pytest.mark.checkout


@pytest.fixture
def short_run(tiny_cogvideox_5b, tmp_path, monkeypatch):
    """The command on a tiny model, of two kinds and one delta."""
    kinds = {name: video_orders.KINDS[name] for name in ("native", "both, reuse")}
    monkeypatch.setattr(video_orders, "KINDS", kinds)
    monkeypatch.setattr(video_orders, "DELTAS", (0.5,))
    monkeypatch.setattr(video_orders, "FRAMES", 9)
    out = tmp_path / "orders.json"

    def run(*words):
        argv = [
            "video_orders",
            str(tiny_cogvideox_5b),
            "--size",
            "32",
            "--steps",
            "2",
            "--captions",
            "1",
            "--out",
            str(out),
        ]
        monkeypatch.setattr("sys.argv", [*argv, *words])
        video_orders.main()
        return json.loads(out.read_text())

    return run


def test_letters_say_what_each_head_does(pipelines):
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3}
    plan = Plan.full(pipelines("tiny_cogvideox_5b").setting(prompt="", **call))
    layers, heads = plan.choices.shape[1:]
    plan = (
        plan.with_method(1, 0, 0, "arrow(1/4)").with_method(1, 0, 1, "arrow(1/4, time)").with_method(2, 0, 0, "cached")
    )
    rest = "f" * (layers * heads)
    assert video_orders.in_letters(plan) == [rest, "nt" + rest[2:], "c" + rest[1:]]


def test_nearness_is_of_frames():
    exact = np.zeros((1, 2, 16, 16, 3), np.float32)
    videos = exact + np.array([0.1, 0.01], np.float32)[:, None, None, None]
    near = video_orders.nearness(videos, exact)
    assert near["psnr"] == pytest.approx([30]) and near["worst_psnr"] == pytest.approx([20], abs=1e-3)
    assert near["worst_ssim"][0] < near["ssim"][0] < 1


def test_a_run_goes_on_from_its_points_and_refuses_others(short_run, monkeypatch, capsys):
    first = short_run()
    assert [point["kind"] for point in first["rows"]] == ["native", "both, reuse"]
    assert first["guidance_scale"] == 4.0 and 0 < first["floor"]["psnr"][0] < 60
    monkeypatch.setattr(video_orders, "DELTAS", (0.5, 0.9))
    monkeypatch.setattr(video_orders, "calibrate", watched := Watched(video_orders.calibrate))
    again = short_run()
    assert watched.deltas == [0.9, 0.9] and len(again["rows"]) == 4
    assert {name: again[name] for name in first if name != "rows"} == {
        name: first[name] for name in first if name != "rows"
    }
    with pytest.raises(SystemExit):
        short_run("--steps", "3")
    assert "choose another --out" in capsys.readouterr().err and len(again["rows"]) == 4


class Watched:
    def __init__(self, calibrate):
        self.calibrate, self.deltas = calibrate, []

    def __call__(self, *args, delta, **options):
        self.deltas.append(delta)
        return self.calibrate(*args, delta=delta, **options)
