"""`dfa2 doctor`, and what every command says where JAX finds no device."""

import platform
import sys
from types import SimpleNamespace

import jax
import pytest

from dfa2_jax import cli


@pytest.mark.parametrize("arguments", [["doctor"], ["sample", "folder", "--prompt", "a", "--out", "images"]])
def test_without_a_device_one_line_says_so(arguments, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

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
    for words in (
        f"jax               {jax.__version__}",
        "blockwise: the default device is",
        "int8 products     xla: ",
        "host memory",
        "driver",
    ):
        assert words in printed
    assert f"python            {platform.python_version()}" in printed and "Mosaic kernels" not in printed


H200, H20 = ("NVIDIA H200", "9.0"), ("NVIDIA H20", "9.0")  # a name that says its generation, and one that does not


@pytest.mark.parametrize(
    ("python", "jax_version", "gpu", "words"),
    [
        ((3, 11), "0.10.2", H200, ["pip on Python 3.11 resolves jax 0.10.2", "make an environment of Python 3.12"]),
        ((3, 12), "0.10.2", H20, ["this is 0.10.2. To have them, pip install 'dfa2-jax[cuda13]' 'jax>=0.11'"]),
        ((3, 12), "0.11.2", H200, []),
        ((3, 11), "0.10.2", ("NVIDIA A100-SXM4-80GB", "8.0"), []),
    ],
)  # fmt: skip
def test_doctor_says_what_an_old_jax_costs_on_hopper(python, jax_version, gpu, words, monkeypatch, capsys):
    name, capability = gpu
    device = SimpleNamespace(device_kind=name, platform="gpu", compute_capability=capability, memory_stats=lambda: None)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "__version__", jax_version)
    monkeypatch.setattr(jax, "__version_info__", tuple(map(int, jax_version.split("."))))
    monkeypatch.setattr(sys, "version_info", python)
    assert cli.main(["doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert len(lines) == bool(words)
    for word in ["Mosaic kernels, the fastest ones on this GPU", *words] if words else []:
        assert word in lines[0]
