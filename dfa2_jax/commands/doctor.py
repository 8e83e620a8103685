"""`dfa2 doctor`: what this machine can do, and what to send with a report."""

import argparse
import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from dfa2_jax.commands.start import devices
from dfa2_jax.nn.attention import arrow_implementation, dense_implementation
from pallas_kernels import Device
from pallas_kernels.products import product_implementation


def run(args: argparse.Namespace) -> int:
    _tell("python", platform.python_version())
    for name in ("dfa2-jax", "jax", "jaxlib", "flax", "orbax-checkpoint"):
        try:
            _tell(name, version(name))
        except PackageNotFoundError:
            _tell(name, "not installed")
    device = devices()[0]
    _tell("device", f"{len(devices())} x {device.device_kind} ({device.platform})")
    _tell("driver", _driver())
    for dtype, head_dim, model in (("bfloat16", 64, "SD3"), ("bfloat16", 128, "FLUX.1"), ("float32", 128, "float32")):
        for kind, choose in (("dense", dense_implementation), ("arrow", arrow_implementation)):
            choice = choose(dtype, head_dim)
            _tell(f"{kind} {model}", f"{choice.implementation}: {choice.why}")
    for name, dtype in (("float8", "float8_e4m3fn"), ("int8", "int8")):
        choice = product_implementation(dtype)
        _tell(f"{name} products", f"{choice.implementation}: {choice.why}")
    if advice := missing_kernels(Device.current()):
        _tell("missing", advice)
    for device in devices():
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
            limit = f"{stats['bytes_limit'] / 1e9:.1f} GB that JAX may use"
            _tell("device memory", f"{free / 1e9:.1f} GB free of {limit}" + f" ({device})" * (len(devices()) > 1))
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _tell("host memory", f"{pages / 1e9:.1f} GB free")
    _tell("disk", f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here")
    return 0


def _tell(name: str, fact: str) -> None:
    print(f"{name:17s} {fact}")


def missing_kernels(device: Device) -> str | None:
    """What a Hopper GPU lacks under a jax older than 0.11, why, and what to do; None where nothing is missing."""
    if device.generation != "hopper" or jax.__version_info__ >= (0, 11):
        return None
    if sys.version_info >= (3, 12):
        why, advice = f"they need jax 0.11, this is {jax.__version__}", "pip install 'dfa2-jax[cuda13]' 'jax>=0.11'"
    else:
        why = f"they need jax 0.11, which needs Python 3.12; pip on Python 3.11 resolves jax {jax.__version__}"
        advice = "make an environment of Python 3.12, and there pip install 'dfa2-jax[cuda13]' 'jax>=0.11'"
    return f"the Mosaic kernels, the fastest ones on this GPU: {why}. To have them, {advice}"


def _driver() -> str:
    """NVIDIA's driver version, from the kernel module: nvidia-smi is not in every container."""
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return "no NVIDIA driver"
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text())
    return version.group() if version else "unknown"
