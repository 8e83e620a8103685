"""`dfa2` as a user runs it."""

import errno
import inspect
import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from mutations import sample_plan
from PIL import Image

import dfa2_jax
from dfa2_jax import Pipeline, Plan, calibrate, cli, convert_checkpoint, options, quality_report
from dfa2_jax.calibration.resume import Checkpointed

PROMPT = "a large red circle"
SIZE = ["--height", "64", "--width", "96", "--steps", "2", "--max-sequence-length", "16"]


def cpu_seconds():
    """Of all processes that this one has started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["--version"]], ids=" ".join)
def test_help_answers_at_once(arguments):
    code = """
import atexit, sys
atexit.register(lambda: print({"jax", "numpy"} & {*sys.modules}, file=sys.stderr))
from dfa2_jax.cli import main
main()
"""
    before = cpu_seconds()
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert cpu_seconds() - before < 0.3
    assert run.stderr == "set()\n", "imported without need"
    assert run.stdout.startswith(f"dfa2 {dfa2_jax.__version__}" if arguments == ["--version"] else "usage: dfa2")


def test_the_package_is_a_command_of_the_same_name():
    run = subprocess.run([sys.executable, "-m", "dfa2_jax", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"dfa2 {version('dfa2-jax')}"


@pytest.mark.parametrize(
    ("function", "groups", "others"),
    [
        (Pipeline.__call__, [options.Options], {"self"}),
        (calibrate, [options.Options, options.CalibrationOptions], {"pipeline", "prompts"}),
        (quality_report, [options.ReportOptions], {"folder", "plans", "prompts", "limits"}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_options_are_those_of_the_functions(function, groups, others):
    """Names and defaults: what a shell says by the one, Python says by the other."""
    signature = inspect.signature(function).parameters.values()
    taken = {name.name: name.default for name in signature if name.name not in others}
    listed = {argument.name: argument.default for group in groups for argument in fields(group)}
    if function is calibrate:
        names = {*options.CALL} | {argument.name for argument in fields(options.CalibrationOptions)}
        listed = {name: default for name, default in listed.items() if name in names}
    assert taken == listed


def test_flags_give_what_python_gives():
    """A list of one is that one, where the argument takes one; numbers are numbers."""
    parse = cli._parser().parse_args
    args = parse(["sample", "folder", "--out", "d", "--prompt", "a", "--seed", "3", "--skip-guidance-layers", "7"])
    values = cli.given(args, options.Options)
    said = {"prompt": "a", "seed": 3, "skip_guidance_layers": [7]}
    assert values == {argument.name: argument.default for argument in cli.flagged(options.Options)} | said
    args = parse(
        ["sample", "folder", "--out", "d", "--prompt", "a", "--prompt", "b", "--prompt-2", "c", "--seed", "1", "2"]
        + ["--sigmas", "1", "0.5", "--clip-skip", "1", "--skip-layer-guidance-scale", "3", "--plan", "p.json"]
    )
    values = cli.given(args, options.Options)
    assert values["prompt"] == ["a", "b"] and values["prompt_2"] == "c" and values["seed"] == [1, 2]
    assert values["sigmas"] == [1.0, 0.5] and values["clip_skip"] == 1 and values["skip_layer_guidance_scale"] == 3.0
    calibration_of = ["calibrate", "folder", "--prompts", "p", "--out", "d"]
    args = parse([*calibration_of, "--windows", "--tiles", "64", "32", "--no-cache"])
    values = cli.given(args, options.CalibrationOptions)
    assert values["windows"] == () and values["tiles"] == (64, 32) and values["cache"] is False
    args = parse(["report", "folder", "--prompts", "p", "--plan", "p", "--out", "d", "--quick", "--dtype", "float16"])
    values = cli.given(args, options.ReportOptions)
    assert values["quick"] is True and values["dtype"] == "float16" and values["seed"] == 0


MISSPELT = {
    "Pipeline": (Pipeline.__call__, "heigth", "height"),
    "Pipeline.from_pretrained": (Pipeline.from_pretrained, "dtpye", "dtype"),
    "calibrate": (calibrate, "attention_chunks", "attention_chunk"),
    "convert_checkpoint": (convert_checkpoint, "dtpye", "dtype"),
    "quality_report": (quality_report, "guidence_scale", "guidance_scale"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_option_is_told_the_nearest(name):
    function, wrong, nearest = MISSPELT[name]
    with pytest.raises(TypeError, match=f"{name} has no argument '{wrong}': did you mean '{nearest}'"):
        function("first", **{wrong: 1})


def test_a_name_near_to_none_is_told_all():
    with pytest.raises(TypeError, match="Options has no argument 'heigth': did you mean 'height'"):
        options.of_names(options.Options, {"heigth": 512})
    with pytest.raises(TypeError, match="CalibrationOptions has no argument 'zzz': it has delta, c, windows"):
        options.of_names(options.CalibrationOptions, {"zzz": 1})
    assert options.of_names(options.Options, {"height": 512}).height == 512


@pytest.mark.parametrize(
    ("function", "group"),
    [
        (Pipeline.__call__, options.Options),
        (calibrate, options.CalibrationOptions),
        (quality_report, options.ReportOptions),
    ],
    ids=["call", "calibrate", "report"],
)
def test_help_in_python_describes_every_option(function, group):
    words = " ".join(function.__doc__.split())
    assert "{options}" not in words
    for argument in fields(group):
        assert f"{argument.name}: {argument.metadata['description']}." in words


def test_sample_writes_images_that_say_how_they_were_made(tiny_sd35, tmp_path, cache, capsys):
    out = tmp_path / "images"
    arguments = ["sample", str(tiny_sd35), "--prompt", PROMPT, "--prompt", "a star", "--negative-prompt", "blurry"]
    assert cli.main([*arguments, *SIZE, "--seed", "3", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "2/2" in printed.err
    for name in ("load", "compile", "encode", "denoise", "per_step", "decode"):
        assert f"{name} " in printed.out.splitlines()[-1]
    paths = sorted(out.iterdir())
    assert [path.name for path in paths] == ["a-large-red-circle-0.png", "a-star-0.png"]
    image = Image.open(paths[1])
    assert image.size == (96, 64)
    made = json.loads(image.text["dfa2_jax"])
    assert made["prompt"] == [PROMPT, "a star"] and made["seed"] == [3, 4] and made["image"] == 1

    by_hand = Pipeline.from_pretrained(tiny_sd35)(
        "a star", negative_prompt="blurry", height=64, width=96, num_inference_steps=2, max_sequence_length=16,
        seed=[4], progress=False,
    )  # fmt: skip
    assert np.abs(np.asarray(image, np.int32) - np.asarray(by_hand.images[0], np.int32)).max() <= 1

    assert cli.main([*arguments, *SIZE, "--quiet", "--out", str(out)]) == 0
    assert len(list(out.iterdir())) == 4, "images were overwritten"
    assert "2/2" not in capsys.readouterr().err


def test_sample_keeps_compiled_programs(tiny_flux_schnell, tmp_path, cache):
    """The second process of a shape compiles nothing that takes long."""
    command = [sys.executable, "-m", "dfa2_jax.cli", "sample", str(tiny_flux_schnell), "--prompt", PROMPT, *SIZE]
    compile_seconds = []
    for _ in range(2):
        run = subprocess.run(
            [*command, "--out", str(tmp_path / "images")], capture_output=True, text=True, check=True, env=os.environ
        )
        compile_seconds.append(float(run.stdout.split("compile ")[1].split(",")[0]))
        assert any(cache.iterdir())
    assert compile_seconds[1] < 0.5 * compile_seconds[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "100 x 128 must be multiples of 16"),
        (["--dtype", "float32", "--steps", "0"], "num_inference_steps=0"),
        (["--seed", "1", "2"], "2 seeds for a batch of 1"),
    ],
)
def test_sample_reports_bad_input_in_one_line(arguments, message, tiny_sd35, tmp_path, cache, capsys):
    assert cli.main(["sample", str(tiny_sd35), "--prompt", PROMPT, "--out", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dfa2 sample: ") and message in line


def test_sample_of_no_folder(tmp_path, cache, capsys):
    assert cli.main(["sample", str(tmp_path / "absent"), "--prompt", PROMPT, "--out", str(tmp_path)]) == 2
    assert "absent is not a folder" in capsys.readouterr().err


def test_an_image_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    image = Image.new("RGB", (64, 64), "red")

    def fail(self, file, **kwargs):
        file.write(b"half a")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Image.Image, "save", fail)
        cli.save_image(image, tmp_path, PROMPT, {})
    assert not list(tmp_path.iterdir())
    path = cli.save_image(image, tmp_path, PROMPT, {"seed": 1})
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as written:
        assert written.size == (64, 64)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a large red circle\n\na small star\n")
    return path


def test_from_prompts_to_a_plan_to_images(tiny_sd35, prompts, tmp_path, cache, capsys):
    plan, out, picture = tmp_path / "plan.json", tmp_path / "images", tmp_path / "plan.png"
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


def test_an_edited_plan_must_be_signed(tiny_sd35, tmp_path, cache, capsys):
    pipeline, path = Pipeline.from_pretrained(tiny_sd35), tmp_path / "plan.json"
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


def test_an_interrupted_calibration_goes_on_with_the_same_command(
    tiny_flux_schnell, prompts, tmp_path, cache, monkeypatch
):
    plan = tmp_path / "plan.json"
    arguments = ["calibrate", str(tiny_flux_schnell), "--prompts", str(prompts), "--out", str(plan), *SIZE[:4]]
    arguments += ["--steps", "4", "--max-sequence-length", "16", "--windows", "4"]
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
        ({"--windows": "0"}, "windows=(0,) must be different positive integers"),
        ({"--height": "100"}, "100 x 128 must be multiples of 16"),
    ],
)
def test_calibrate_reports_bad_input_in_one_line(change, message, tiny_sd35, prompts, tmp_path, cache, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    options = {"--prompts": str(prompts), "--out": str(tmp_path / "plan.json")}
    options |= {name: value.format(tmp=tmp_path) for name, value in change.items()}
    assert cli.main(["calibrate", str(tiny_sd35), *(word for pair in options.items() for word in pair)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dfa2 calibrate: ") and message in line
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("arguments", [["doctor"], ["sample", "folder", "--prompt", PROMPT, "--out", "images"]])
def test_without_a_device_one_line_says_so(arguments, cache, monkeypatch, capsys):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "JAX finds no device to run on (JAX_PLATFORMS is cuda)" in line and "Unable to initialize" in line


def test_doctor_names_device_and_attention(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for words in (f"jax               {jax.__version__}", "blockwise: the default device is", "host memory", "driver"):
        assert words in printed
    assert f"python            {platform.python_version()}" in printed and "Mosaic kernels" not in printed


@pytest.mark.parametrize(
    ("python", "jax_version", "capability", "words"),
    [
        ((3, 11), "0.10.2", "9.0", ["pip on Python 3.11 resolves jax 0.10.2", "make an environment of Python 3.12"]),
        ((3, 12), "0.10.2", "9.0", ["this is 0.10.2. To have them, pip install 'dfa2-jax[cuda13]' 'jax>=0.11'"]),
        ((3, 12), "0.11.2", "9.0", []),
        ((3, 11), "0.10.2", "8.0", []),
    ],
)  # fmt: skip
def test_doctor_says_what_an_old_jax_costs_on_hopper(python, jax_version, capability, words, monkeypatch, capsys):
    gpu = SimpleNamespace(
        device_kind="NVIDIA H200", platform="gpu", compute_capability=capability, memory_stats=lambda: None
    )
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    monkeypatch.setattr(jax, "__version__", jax_version)
    monkeypatch.setattr(jax, "__version_info__", tuple(map(int, jax_version.split("."))))
    monkeypatch.setattr(sys, "version_info", python)
    assert cli.main(["doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert len(lines) == bool(words)
    for word in ["Mosaic kernels, the fastest ones on this GPU", *words] if words else []:
        assert word in lines[0]


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
