"""`dfa2 report`: the gate's exit code, interruption, and bad input told in one line."""

import pickle
import re
from dataclasses import replace
from itertools import groupby

import jax
import numpy as np
import pytest
from report_cases import PROMPTS, SIZE, three_plans

from dfa2_jax import Pipeline, Plan, PlanError, cli, quality_report
from dfa2_jax.commands.report import verdict
from dfa2_jax.report import metrics
from dfa2_jax.report.table import Line, Report


@pytest.fixture(scope="module")
def plans(tiny_sd35):
    return three_plans(tiny_sd35)


@pytest.fixture
def command(tiny_sd35, plans, tmp_path, cache):
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.json")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")

    def run(**changes):
        options = {"plan": tmp_path / "broken.json", "prompts": tmp_path / "prompts.txt", "out": tmp_path / "out"}
        words = [
            f"--{name.replace('_', '-')}={value}" for name, value in (options | changes).items() if value is not None
        ]
        return cli.main(["report", str(tiny_sd35), "--quick", "--batch=4", *words])

    return run


def test_the_gate_has_an_exit_code(command, tmp_path, capsys):
    assert command(min_psnr=18) == 0
    printed = capsys.readouterr()
    verdict, path = printed.out.splitlines()
    assert path == str(tmp_path / "out" / "report.html") and "2/2" in printed.err
    assert verdict.startswith("Passed: all limits are kept. Plan broken is ") and verdict.endswith(
        " dB to the dense ones."
    )
    assert command(min_psnr=18, min_ssim=0.97) == 1
    printed = capsys.readouterr()
    failures = [line for line in printed.err.splitlines() if line.startswith("dfa2 report: ")]
    assert printed.out.startswith("Failed: 1 limit is missed. Plan broken is ")
    assert len(failures) == 1 and "plan broken: mean SSIM 0." in failures[0] and "below the limit 0.97" in failures[0]
    assert (tmp_path / "out" / "report.json").exists(), "a failed gate has its report too"
    assert command(plan=tmp_path / "full.json", min_ssim=0.9999) == 0


def test_no_bar_hides_a_compilation_and_phases_are_told(plans, tiny_sd35, bars, compilations, monkeypatch, capsys):
    """With all lines: a plan of heads beside one of steps, solvers, and the limit."""
    pipeline = Pipeline.from_pretrained(tiny_sd35)
    setting = pipeline.setting(prompt="", **SIZE | {"height": 48, "width": 112})
    steps = replace(Plan.full(setting, (0, 2)), coefficients=np.array([[-0.5, 0.0], [-0.6, 0.1]]))
    heads = Plan.full(setting).with_method(slice(1, None), None, None, "arrow(1/4)")
    jax.clear_caches()  # whatever other tests compiled
    quality_report(tiny_sd35, {"steps": steps, "heads": heads}, PROMPTS[:1])
    assert bars == [("report", 0), ("heads", 0), ("report", 0)] and compilations
    told = capsys.readouterr().err
    phases = re.findall(r"\r(loading|encoding|compiling|report|heads)\b", told)
    assert [name for name, _ in groupby(phases)] == [
        *("loading", "encoding", "compiling", "report", "compiling", "heads"),
        *("loading", "encoding", "compiling", "report"),
    ]
    assert " 9/9 " in told


@pytest.mark.parametrize(
    ("psnr", "limits", "words"),
    [
        (30.0, {}, "No limits were set. Plan p is 2.00 times as fast as dense sampling, and its images keep a mean "
            "PSNR of 30.0 dB to the dense ones (for scale: float16 45.0 dB; another seed 10.0 dB)."),
        (44.0, {"psnr": 40.0}, "Passed: all limits are kept. Plan p is 2.00 times as fast as dense sampling, and its "
            "images keep a mean PSNR of 44.0 dB to the dense ones, within the noise of rounding."),
        (30.0, {"psnr": 40.0}, "Failed: 1 limit is missed. Plan p "),
    ],
)  # fmt: skip
def test_the_first_line_is_a_verdict_in_words(psnr, limits, words):
    lines = (
        Line("dense", "dense", seconds=[1.0]),
        Line("float16", "floor", scores={"psnr": [43.0, 47.0]}),
        Line("p", "plan", scores={"psnr": [psnr, psnr]}, seconds=[0.5]),
        Line("another seed", "ceiling", scores={"psnr": [9.0, 11.0]}),
    )
    said = verdict(Report(lines, ("a", "b"), (0,), limits, None, {}))
    assert said.startswith(words) and "\n" not in said


def test_an_interrupted_report_leaves_no_file(command, tmp_path, monkeypatch, capsys):
    def stop(image, exact):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "ssim", stop)
    assert command() == 130
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "{tmp}/empty.txt"}, "holds no prompt: write one per line"),
        ({"prompts": "{tmp}/latin1.txt"}, "latin1.txt is not UTF-8"),
        ({"prompts": "{tmp}/absent.txt"}, "absent.txt"),
        ({"out": "{tmp}/prompts.txt/out"}, "prompts.txt"),
        ({"plan": "{tmp}/other.json"}, "plan other: The plan is for another sampling call."),
        ({"plan": "{tmp}/absent.json"}, "absent.json cannot be read"),
        ({"max_lpips": 0.1}, "give lpips too"),
        ({"min_ssim": "nan"}, "limits has ssim=nan"),
        ({"min_ssim": "2"}, "limits has ssim=2.0, but ssim is -1 to 1"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"lpips": "{tmp}/lpips.pth"}, "must be a .safetensors file (pickle, .pth, is never read)"),
        ({"lpips": "{tmp}/absent.safetensors"}, "lpips.LPIPS(net="),
        ({"clip": "{tmp}"}, "in safetensors (pickle, .bin, is never read)"),
        ({"image_reward": "{tmp}"}, "is not supported: the image-reward package"),
    ],
)
def test_bad_input_is_told_in_one_line(changes, message, command, plans, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes("Übung".encode("latin-1"))
    (tmp_path / "lpips.pth").write_bytes(pickle.dumps({"net": 1}))
    plans["full"].for_weights("another model").save(tmp_path / "other.json")
    changes = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    assert command(**changes) == 2
    phases, _, told = capsys.readouterr().err.partition("dfa2 report: ")
    assert message in told and all(line.startswith(("loading", "encoding")) for line in phases.splitlines())
    assert not list(tmp_path.glob("out/*"))


def test_plans_of_other_sizes_are_refused_by_name(plans, tiny_sd35):
    pipeline = Pipeline.from_pretrained(tiny_sd35)
    wide = Plan.full(pipeline.setting(prompt="", **SIZE | {"width": 128})).with_method(1, 0, 0, "cached")
    with pytest.raises(PlanError, match=r"plan wide: (.|\n)*width is 128 in the plan and 96 in the call"):
        quality_report(tiny_sd35, {"full": plans["full"], "wide": wide}, PROMPTS, progress=False)


def test_plans_of_one_name_go_by_their_paths(command, plans, tiny_sd35, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    plans["full"].save(tmp_path / "a" / "broken.json")
    first, second = str(tmp_path / "broken.json"), str(tmp_path / "a" / "broken.json")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), "--quick", "--batch=4"]
    assert cli.main(["report", str(tiny_sd35), "--plan", first, "--plan", first, *options]) == 2
    assert "broken.json is there twice" in capsys.readouterr().err
    assert cli.main(["report", str(tiny_sd35), "--plan", first, "--plan", second, *options, "--min-ssim", "0.97"]) == 1
    assert f"plan {first}: mean SSIM" in (told := capsys.readouterr().err) and second not in told
