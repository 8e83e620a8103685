"""Two processes of two devices each, as on two hosts: the images of one."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from checkout import ROOT
from PIL import Image

from dfa2_jax import Pipeline, Plan
from dfa2_jax.cli import main
from dfa2_jax.parallel import processes

CALL = {"height": 48, "width": 80, "num_inference_steps": 2, "max_sequence_length": 13, "guidance_scale": 4.0}

PROCESS = """
import sys
import jax

folder, out, address, number, shard = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(number))

import numpy as np
from dfa2_jax import Method, Pipeline, Plan

call = CALL
pipeline = Pipeline.from_pretrained(folder, devices="all", shard_weights=bool(int(shard)))
try:
    Pipeline.from_pretrained(folder, devices=2)
except ValueError as error:
    assert "with 2 processes must be" in str(error), error
else:
    raise AssertionError("two of four devices are taken")
setting = pipeline.setting(prompt="a red box", **call)
full = Plan.full(setting)
choices = np.random.default_rng(0).integers(0, 3, full.choices.shape).astype(np.uint8)
choices[0] = 0
plan = Plan(setting, (*full.methods, Method.arrow(4), Method("cached")), choices)
images = [pipeline("a red box", **call, plan=x, output_type="latent", progress=False).images for x in (None, plan)]
np.save(f"{out}/{number}.npy", np.stack(images))
"""


@pytest.mark.long
@pytest.mark.parametrize("shard", [0, 1])
def test_two_processes_make_the_images_of_one(tiny_sd35, tmp_path, shard):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    script = PROCESS.replace("CALL", repr(CALL))
    commands = [
        [sys.executable, "-c", script, str(tiny_sd35), str(tmp_path), address, str(number), str(shard)]
        for number in range(2)
    ]
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert not any(process.returncode for process in running), errors
    one = Pipeline.from_pretrained(tiny_sd35)
    wanted = np.asarray(one("a red box", **CALL, output_type="latent", progress=False).images, np.float64)
    for number in range(2):
        dense, planned = np.load(tmp_path / f"{number}.npy").astype(np.float64)
        assert np.linalg.norm(dense - wanted) < 1e-5 * np.linalg.norm(wanted)
        assert not np.allclose(dense, planned, atol=1e-3)
    np.testing.assert_array_equal(*(np.load(tmp_path / f"{number}.npy") for number in range(2)))


BY_HAND = {"MASTER_ADDR": "host", "MASTER_PORT": "1234", "RANK": "1", "WORLD_SIZE": "2"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}


def test_a_launcher_is_known_by_its_variables():
    told = processes.launched(SLURM | BY_HAND)  # by hand comes first
    assert told is not None
    assert (told["coordinator_address"], told["num_processes"], told["process_id"]) == ("host:1234", 2, 1)
    assert told["local_device_ids"] is None
    told = processes.launched(BY_HAND | {"LOCAL_RANK": "3"})
    assert told is not None and told["local_device_ids"] == [3]
    assert processes.launched(SLURM) == processes.launched(OPEN_MPI) == {}  # JAX reads these by itself


@pytest.mark.parametrize(
    "variables",
    [
        {},
        BY_HAND | {"WORLD_SIZE": "1"},
        SLURM | {"SLURM_NTASKS": "1"},
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},  # a batch script, not srun
        {"MASTER_ADDR": "host", "MASTER_PORT": "1234"},
    ],
)
def test_one_process_is_alone(variables):
    assert processes.launched(variables) is None


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (BY_HAND | {"MASTER_PORT": ""}, r"RANK=1 and WORLD_SIZE=2 are set, and \['MASTER_PORT'\]"),
        (BY_HAND | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two' must be a number"),
    ],
)
def test_half_a_launcher_is_refused(variables, words):
    with pytest.raises(ValueError, match=words):
        processes.launched(variables)


def test_processes_that_differ_say_in_what(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)

    def second_says(**facts):
        monkeypatch.setattr(processes, "said_by_all", lambda own: [own, json.dumps(facts).encode()])

    second_says(weights="a", seed=[1])
    processes.check_alike({"weights": "a", "seed": [1]})
    with pytest.raises(ValueError, match=r"0 and 1 .* differ in seed: \[2\] and \[1\]\. Start"):
        processes.check_alike({"weights": "a", "seed": [2]})
    second_says(weights="b", error="no file")
    with pytest.raises(ValueError, match="^Process 1 cannot begin: no file$"):
        processes.check_alike({"weights": "a"})


def test_others_go_on_from_the_first_ones_progress(monkeypatch, tmp_path):
    path = tmp_path / "plan.json.progress"
    with processes.progress_of_first(path) as own:
        assert own == path
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "said_by_first", lambda content: b"steps" if content == b"" else content)
    with processes.progress_of_first(path) as own:
        assert own != path and own.read_bytes() == b"steps"
    assert not own.exists() and not path.exists()


def test_heads_are_measured_by_one_process(monkeypatch, tiny_sd35, tmp_path, capsys):
    (prompts := tmp_path / "prompts.txt").write_text("a red box")
    monkeypatch.setattr("dfa2_jax.commands.calibrate.jax.process_count", lambda: 2)
    command = ["calibrate", str(tiny_sd35), "--prompts", str(prompts), "--out", str(tmp_path / "plan.json")]
    for flags in ([], ["--delta", "0.5", "--heads", "full"]):
        assert main([*command, *flags]) == 2
        assert "heads are measured by one process" in capsys.readouterr().err


def commands(folder, out, *flags, of_second=(), name="sample"):
    """`dfa2 sample`, or another command, in two processes, not waited for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    variables = os.environ | BY_HAND | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    command = [sys.executable, "-m", "dfa2_jax", name, str(folder), "--devices", "all", *SIZE, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return [
        subprocess.Popen([*command, *own, "--out", str(out)], env=variables | {"RANK": str(number)}, **pipes)
        for number, own in enumerate(((), of_second))
    ]


SIZE = "--height", "48", "--width", "80", "--max-sequence-length", "13"
PROMPT = "--prompt", "a red box"


@pytest.mark.long
def test_a_killed_process_ends_the_command_which_then_goes_on_to_the_images_of_one(tiny_sd35, tmp_path):
    made, wanted = tmp_path / "two", tmp_path / "one"
    flags = *PROMPT, "--steps", "4", "--seed", *map(str, range(30))
    first, second = commands(tiny_sd35, made, *flags)
    assert first.stdout is not None
    kept = first.stdout.readline().strip()
    second.send_signal(signal.SIGKILL)
    out, error = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert first.returncode == 2 and "process 0 of 2 cannot go on, or has lost another" in error, error
    assert len(out.splitlines()) < 29, "killed too late to be a loss"

    flags = "--steps", "4", "--seed", "0", "1", "29"
    first, second = commands(tiny_sd35, made, *PROMPT, *flags)
    (out, error), (nothing, of_second) = (process.communicate(timeout=300) for process in (first, second))
    assert (first.returncode, second.returncode) == (0, 0), (error, of_second)
    assert f"skipped {kept}" in error and nothing == "" and "denoise" not in of_second
    paths = out.splitlines()
    assert len(paths) == 3 and paths[0] == kept
    assert main(["sample", str(tiny_sd35), *SIZE, *PROMPT, *flags, "--out", str(wanted)]) == 0
    for path in paths:
        one, two = (np.asarray(Image.open(folder / os.path.basename(path)), np.int32) for folder in (wanted, made))
        assert np.abs(one - two).max() <= 1 and np.ptp(one) > 10


@pytest.mark.long
def test_processes_of_other_arguments_are_refused_before_any_work(tiny_sd35, tmp_path):
    running = commands(tiny_sd35, tmp_path / "out", *PROMPT, "--seed", "1", of_second=("--seed", "2"))
    for process in running:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 2 and "differ in --seed: [1] and [2]" in error, error
        assert out == "" and "loading" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_prompt_file_that_one_process_lacks_is_named_by_all(tiny_sd35, tmp_path):
    (prompts := tmp_path / "prompts.txt").write_text("a red box")
    flags = "--prompts", str(prompts), "--seed", "1"
    running = commands(tiny_sd35, tmp_path / "out", *flags, of_second=("--prompts", str(tmp_path / "none.txt")))
    for process in running:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 2 and "Process 1 cannot begin" in error and "none.txt" in error, error


@pytest.mark.long
def test_two_processes_calibrate_as_one(tiny_sd35, tmp_path):
    (prompts := tmp_path / "prompts.txt").write_text("a red box\ntwo green balls\n")
    plans = [tmp_path / "one.json", tmp_path / "two.json"]
    flags = "--prompts", str(prompts), "--steps", "5", "--heads", "full", "--psnr", "30"
    assert main(["calibrate", str(tiny_sd35), *SIZE, *flags, "--out", str(plans[0])]) == 0
    for process in commands(tiny_sd35, plans[1], *flags, name="calibrate"):
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    one, two = map(Plan.load, plans)
    assert one.nodes == two.nodes and one.step_calibration is not None and two.step_calibration is not None
    np.testing.assert_allclose(one.coefficients, two.coefficients, rtol=1e-3, atol=1e-4)
    assert one.step_calibration.psnr == pytest.approx(two.step_calibration.psnr, abs=0.1)
