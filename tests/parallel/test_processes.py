"""Two processes of two devices each, as on two hosts: the images of one."""

import socket
import subprocess
import sys

import numpy as np
import pytest
from checkout import ROOT

from dfa2_jax import Pipeline

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
