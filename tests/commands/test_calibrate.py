"""`dfa2 calibrate`, `dfa2 plan` and what a report needs, as a user runs them."""

import json
import sys

import pytest
from mutations import sample_plan, step_plan
from PIL import Image

from dfa2_jax import Pipeline, Plan, cli
from dfa2_jax.calibration.resume import Checkpointed

PROMPT = "a large red circle"
SIZE = ["--height", "64", "--width", "96", "--steps", "2", "--max-sequence-length", "16"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a large red circle\n\na small star\n")
    return path


def test_a_file_that_is_no_plan_is_not_replaced(prompts, tmp_path, monkeypatch, capsys):
    """The prompts themselves, for one."""
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    before = prompts.read_bytes()
    assert cli.main(["calibrate", "folder", "--prompts", str(prompts), "--out", str(prompts)]) == 2
    assert f"--out {prompts} is there, and is no plan: choose another name" in capsys.readouterr().err
    assert prompts.read_bytes() == before


def test_from_prompts_to_a_plan_to_images(tiny_sd35, prompts, tmp_path, cache, capsys):
    plan, out, picture = tmp_path / "plan.json", tmp_path / "images", tmp_path / "plan.json.png"
    arguments = ["calibrate", str(tiny_sd35), "--prompts", str(prompts), "--out", str(plan), *SIZE[:4], "--steps", "3"]
    arguments += ["--max-sequence-length", "16", "--delta", "3", "--c", "0", "--windows", "4", "--tiles", "16", "16"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(plan)
    found = Plan.load(plan)
    assert found.calibration.num_prompts == 2 and found.calibration.c is None and found.calibration.delta == 3
    assert found.density() < 1 and {path.name for path in tmp_path.glob("plan*")} == {"plan.json"}

    assert cli.main(["plan", "show", str(plan)]) == 0
    shown = capsys.readouterr().out
    assert "64 x 96, 3 steps, guided" in shown and "2 prompts, seed 0, delta 3.0, c None" in shown
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 300

    assert cli.main(["sample", str(tiny_sd35), "--prompt", PROMPT, "--plan", str(plan), "--out", str(out)]) == 0
    (image,) = out.iterdir()
    with Image.open(image) as written:
        assert written.size == (96, 64)
        assert json.loads(written.text["dfa2_jax"])["plan"] == found.digest
    capsys.readouterr()
    arguments = ["sample", str(tiny_sd35), "--prompt", PROMPT, "--plan", str(plan), "--out", str(out), "--steps", "4"]
    assert cli.main(arguments) == 2
    assert "sigmas is" in capsys.readouterr().err


def test_an_edited_plan_must_be_signed(tmp_path, cache, capsys, pipelines):
    pipeline, path = pipelines("tiny_sd35"), tmp_path / "plan.json"
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}
    plan = Plan.full(pipeline.setting(prompt=PROMPT, **size)).with_method(1, "joint.1", 0, "cached")
    plan.save(path)
    edited = path.read_text().replace('"joint.1": "cfff"', '"joint.1": "ccff"')
    assert edited != path.read_text()
    path.write_text(edited)
    assert cli.main(["plan", "show", str(path)]) == 2
    assert f"`dfa2 plan sign {path}`" in capsys.readouterr().err
    assert cli.main(["plan", "sign", str(path)]) == 0
    signed = Plan.load(path)
    assert capsys.readouterr().out.strip() == signed.digest and signed.edited
    assert [str(signed.methods[n]) for n in signed.choices[1, 2]] == ["cached", "cached", "full", "full"]
    path.write_text(edited.replace("ccff", "cc"))
    assert cli.main(["plan", "sign", str(path)]) == 2
    assert "steps[1].joint.1 has 2 heads" in capsys.readouterr().err


def test_another_budget_from_a_shell_needs_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    plan, path, out = step_plan(), tmp_path / "plan.json", tmp_path / "other.json"
    plan.save(path)
    for words, budget in ((["--speedup", "3"], {"speedup": 3.0}), (["--psnr", "30"], {"psnr": 30.0})):
        assert cli.main(["plan", "resolve", str(path), *words, "--out", str(out)]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        assert Plan.load(out) == plan.resolve(**budget)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of speedup, psnr must be given, not none"),
        (["--speedup", "2", "--psnr", "40"], "not speedup=2.0 and psnr=40.0"),
        (["--speedup", "10"], "speedup=10.0 must be from 1 to 9 for 9 steps"),
        (["--speedup", "2", "--out", "{tmp}/plan.json"], "is the plan itself, whose own run would be lost"),
        (["--speedup", "2", "--out", "{tmp}/note.txt"], "note.txt is there, and is no plan: choose another name"),
        (["--speedup", "2", "--out", "{tmp}/absent/plan.json"], "not in a folder that is there and writable"),
    ],
)
def test_another_budget_that_cannot_be_writes_nothing(words, message, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("a note")
    step_plan().save(tmp_path / "plan.json")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words = ["--out", str(tmp_path / "out.json"), *(word.format(tmp=tmp_path) for word in words)]
    assert cli.main(["plan", "resolve", str(tmp_path / "plan.json"), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dfa2 plan: ") and message in line
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_calibration_goes_on_with_the_same_command(
    tiny_flux_schnell, prompts, tmp_path, cache, monkeypatch
):
    plan = tmp_path / "plan.json"
    arguments = ["calibrate", str(tiny_flux_schnell), "--prompts", str(prompts), "--out", str(plan), *SIZE[:4]]
    arguments += ["--steps", "4", "--max-sequence-length", "16", "--delta", "0.4", "--windows", "4"]
    add, seen = Checkpointed.add, []

    def stop(self, *found):
        add(self, *found)
        seen.append(self.steps)
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointed, "add", stop)
    assert cli.main(arguments) == 130 and not plan.exists()
    assert cli.main(arguments) == 0 and seen == [1, 2, 3]
    assert plan.exists() and not (tmp_path / "plan.json.progress").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--prompts": "{tmp}/empty.txt"}, "holds no prompt: write one per line"),
        ({"--prompts": "{tmp}/absent.txt"}, "absent.txt"),
        ({"--out": "{tmp}/absent/plan.json"}, "not in a folder that is there and writable"),
        ({"--delta": "-1"}, "delta=-1.0 must be a number"),
        ({"--delta": "0.4", "--windows": "0"}, "windows=(0,) must be different positive integers"),
        ({"--height": "100"}, "100 x 128 must be multiples of 16"),
    ],
)
def test_calibrate_reports_bad_input_in_one_line(change, message, tiny_sd35, prompts, tmp_path, cache, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    options = {"--prompts": str(prompts), "--out": str(tmp_path / "plan.json")}
    options |= {name: value.format(tmp=tmp_path) for name, value in change.items()}
    assert cli.main(["calibrate", str(tiny_sd35), *(word for pair in options.items() for word in pair)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # after "loading", where it was read
    assert line.startswith("dfa2 calibrate: ") and message in line
    assert not (tmp_path / "plan.json").exists()


@pytest.fixture
def without(monkeypatch):
    """Packages that cannot be imported."""

    def hide(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def test_a_plan_is_summarised_without_matplotlib(without, tmp_path, capsys):
    path, picture = tmp_path / "plan.json", tmp_path / "other.png"
    sample_plan(0).save(path)
    without("matplotlib")
    assert cli.main(["plan", "show", str(path)]) == 0
    printed = capsys.readouterr()
    assert "128 x 128, 3 steps, guided" in printed.out and "png" not in printed.out
    assert "needs matplotlib: pip install 'dfa2-jax[plots]'" in printed.err
    assert cli.main(["plan", "show", str(path), "--png", str(picture)]) == 2
    assert "dfa2-jax[plots]" in capsys.readouterr().err and not picture.exists()


@pytest.mark.parametrize("package", ["skimage.metrics", "matplotlib"])
def test_a_report_asks_for_its_extra_before_any_work(package, without, prompts, tmp_path, cache, capsys):
    sample_plan(0).save(tmp_path / "plan.json")
    without(package)
    arguments = ["report", str(tmp_path / "absent"), "--plan", str(tmp_path / "plan.json"), "--prompts", str(prompts)]
    assert cli.main([*arguments, "--out", str(tmp_path / "report")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"A report needs {package.partition('.')[0]}: pip install 'dfa2-jax[report]'" in line
