"""`dfa2`'s flags and help: those of the functions, with diffusers' names, and the nearest for a misspelt one."""

import inspect
import os
import resource
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest

import dfa2_jax
from dfa2_jax import Output, Pipeline, Plan, calibrate, cli, convert_checkpoint, options, quality_report
from dfa2_jax.commands import flags
from dfa2_jax.io.names import of_names


def cpu_seconds():
    """Seconds of all processes that this process has started and waited for."""
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
    values = flags.given(args, options.Options)
    said = {"prompt": "a", "seed": 3, "skip_guidance_layers": [7]}
    assert values == {argument.name: argument.default for argument in flags.flagged(options.Options)} | said
    args = parse(
        ["sample", "folder", "--out", "d", "--prompt", "a", "--prompt", "b", "--prompt-2", "c", "--seed", "1", "2"]
        + ["--sigmas", "1", "0.5", "--clip-skip", "1", "--skip-layer-guidance-scale", "3", "--plan", "p.json"]
    )
    values = flags.given(args, options.Options)
    assert values["prompt"] == ["a", "b"] and values["prompt_2"] == "c" and values["seed"] == [1, 2]
    assert values["sigmas"] == [1.0, 0.5] and values["clip_skip"] == 1 and values["skip_layer_guidance_scale"] == 3.0
    calibration_of = ["calibrate", "folder", "--prompts", "p", "--out", "d"]
    args = parse([*calibration_of, "--windows", "--tiles", "64", "32", "--no-cache"])
    values = flags.given(args, options.CalibrationOptions)
    assert values["windows"] == () and values["tiles"] == (64, 32) and values["cache"] is False
    args = parse(["report", "folder", "--prompts", "p", "--plan", "p", "--out", "d", "--quick", "--dtype", "float16"])
    values = flags.given(args, options.ReportOptions)
    assert values["quick"] is True and values["dtype"] == "float16" and values["seed"] == 0


MISSPELT = {
    "Pipeline": (Pipeline.__call__, "heigth", "height"),
    "Pipeline.from_pretrained": (Pipeline.from_pretrained, "dtpye", "dtype"),
    "calibrate": (calibrate, "attention_chunks", "attention_chunk"),
    "convert_checkpoint": (convert_checkpoint, "dtpye", "dtype"),
    "quality_report": (quality_report, "guidence_scale", "guidance_scale"),
    "Pipeline.encode_prompt": (Pipeline.encode_prompt, "clip_skp", "clip_skip"),
    "Pipeline.setting": (Pipeline.setting, "heigth", "height"),
    "Plan.resolve": (Plan.resolve, "speedpu", "speedup"),
    "Plan.density": (Plan.density, "tile", "tiles"),
    "Plan.with_method": (Plan.with_method, "methd", "method"),
    "Output.save": (Output.save, "fromat", "format"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_option_is_told_the_nearest(name):
    function, wrong, nearest = MISSPELT[name]
    with pytest.raises(TypeError, match=f"{name} has no argument '{wrong}': did you mean '{nearest}'"):
        function("first", **{wrong: 1})


def test_a_name_near_to_none_is_told_all():
    with pytest.raises(TypeError, match="Options has no argument 'heigth': did you mean 'height'"):
        of_names(options.Options, {"heigth": 512})
    with pytest.raises(
        TypeError, match="no argument 'zzz': it has speedup, psnr, target, heads, attention_share, delta, c"
    ):
        of_names(options.CalibrationOptions, {"zzz": 1})
    assert of_names(options.Options, {"height": 512}).height == 512


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


SAMPLE = ["sample", "folder", "--out", "d", "--prompt", "a"]


def test_a_flag_with_a_name_of_ours_takes_diffusers_too():
    parse = cli._parser().parse_args
    for words, name, value in [
        (["--steps", "3"], "num_inference_steps", 3),
        (["--num-inference-steps", "3"], "num_inference_steps", 3),
        (["--torch-dtype", "float16"], "dtype", "float16"),
    ]:
        assert getattr(parse([*SAMPLE, *words]), name) == value
    with pytest.raises(SystemExit):
        parse(["calibrate", "folder", "--prompts", "p", "--out", "d", "--cache"])  # the other side of --no-cache


REFUSED = [
    ([*SAMPLE, "--heigth", "3"], "dfa2 sample", "unrecognized arguments: --heigth (did you mean --height?)"),
    ([*SAMPLE, "--heig", "3"], "dfa2 sample", "unrecognized arguments: --heig (did you mean --height?)"),
    (["sample", "a", "--ou", "d"], "dfa2 sample", "unrecognized arguments: --ou (did you mean --out?)"),
    ([*SAMPLE, "--num=3"], "dfa2 sample", "(did you mean --num-frames or --num-inference-steps or --num-images-"),
    ([*SAMPLE, "--num_inference_steps=3"], "dfa2 sample", "(did you mean --num-inference-steps?)"),
    (["plan", "show", "p", "--pgn=a"], "dfa2 plan show", "unrecognized arguments: --pgn (did you mean --png?)"),
    (["--verison", "doctor"], "dfa2", "unrecognized arguments: --verison (did you mean --version?)"),
    (["--verison"], "dfa2", "unrecognized arguments: --verison (did you mean --version?)"),
    (["plan", "--hlep"], "dfa2 plan", "unrecognized arguments: --hlep (did you mean --help?)"),
    (["doctor", "--zzz"], "dfa2 doctor", "unrecognized arguments: --zzz\n"),
    (["doctor", "zzz"], "dfa2 doctor", "unrecognized arguments: zzz\n"),
    (["sampel"], "dfa2 sample", "dfa2: error: no command 'sampel': did you mean sample?"),
    (["plan", "sing"], "dfa2 plan sign", "dfa2 plan: error: no command 'sing': did you mean sign?"),
    (["plan", "zzz"], "dfa2 plan", "dfa2 plan: error: no command 'zzz': there are show, sign, resolve"),
]


@pytest.mark.parametrize(("arguments", "usage", "message"), REFUSED, ids=[" ".join(case[0][-2:]) for case in REFUSED])
def test_an_unknown_word_is_told_the_nearest_and_the_usage_of_its_command(arguments, usage, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    told = capsys.readouterr().err
    assert end.value.code == 2 and message in told
    assert told.startswith(f"usage: {usage} [-h]")


def test_a_prompt_may_look_like_a_flag():
    args = cli._parser().parse_args([*SAMPLE, "--prompt", "--a minus", "--prompt=--b"])
    assert args.prompt == ["a", "--a minus", "--b"]


def test_convert_takes_no_abbreviation(capsys):
    with pytest.raises(SystemExit):
        cli.convert(["a", "b", "--dt", "float16"])
    assert "unrecognized arguments: --dt (did you mean --dtype?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "answer"), [("generator", "pass seed="), ("torch_dtype", "pass dtype="), ("device_map", "jax.devices")]
)
def test_an_argument_of_diffusers_that_has_another_form_is_answered(name, answer):
    for function in (Pipeline.__call__, Pipeline.from_pretrained):
        with pytest.raises(TypeError, match=f"has no argument '{name}': .*{answer}"):
            function("first", **{name: 1})


def test_a_pipeline_that_is_sent_to_a_device_says_where_it_is():
    with pytest.raises(NotImplementedError, match=r"pipeline.to\('cuda'\): .*jax.devices\(\).*CUDA_VISIBLE_DEVICES"):
        Pipeline.to(object(), "cuda")


def test_a_reader_that_has_left_ends_a_command_quietly():
    code = "import sys; from dfa2_jax.cli import main; sys.exit(main(['--help']))"
    command = [sys.executable, "-c", code]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered) as run:
        assert run.stdout and run.stderr
        run.stdout.close()
        assert (run.stderr.read(), run.wait()) == ("", 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["plan", "show", "absent.json"]])
def test_a_full_stdout_is_one_line(words):
    code = f"import sys; from dfa2_jax.cli import main; sys.exit(main({words}))"
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    last = "No such file or directory" if "plan" in words else "stdout cannot be written: No space left on device"
    assert run.returncode == (2 if "plan" in words else 1) and last in run.stderr and "Traceback" not in run.stderr
