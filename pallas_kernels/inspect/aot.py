"""Compile for a named NVIDIA GPU on a machine without one, nor a driver:

    JAX_PLATFORMS=cpu python3.12 ...    # after, with the version of the installed jax,
    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    pip install --no-deps nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.*    # ptxas, where no CUDA toolkit is
    pip install --no-deps nvidia-cudnn-cu13    # for programs with implementation="cudnn": 0.5 GB
    pip install --no-deps nvidia-cuda-nvdisasm    # for `kernels`

XLA's whole pipeline runs, down to machine code. What is not there is autotuning, which times kernels: XLA takes a fixed
choice for every matrix product, its Triton emitter with a default tile. `options={"xla_gpu_enable_triton_gemm": False}`
compiles them all to cuBLAS instead, as the sampling loops do by themselves (`XLA_OPTIONS` in dfa2_jax).
"""

import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src.lib.mlir import ir
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.inspect.sass import Kernel, disassemble


class Target(NamedTuple):
    """A GPU that programs are compiled for: a mesh of one device, or of several on one host."""

    name: str
    mesh: Mesh

    def abstract(self, tree: Any) -> Any:
        """Arrays or `jax.ShapeDtypeStruct`s as abstract arrays on this GPU; nothing is allocated.

        A struct that says how several GPUs share it stays as it is; all else is whole on each.
        """
        whole = NamedSharding(self.mesh, PartitionSpec())

        def on_gpu(x: Any) -> jax.ShapeDtypeStruct:
            shared = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shared or whole)

        return jax.tree.map(on_gpu, tree)


class Compiled(NamedTuple):
    """What compilation cost, and what the program will need on the device, in bytes."""

    lower_seconds: float
    compile_seconds: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Bytes of outputs that take an argument's buffer."""
    temp_bytes: int
    hlo: str

    @property
    def peak_bytes(self) -> int:
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes


def targets() -> list[str]:
    """Names of the GPUs that are described here."""
    return sorted(file.name.removesuffix(".txtpb") for file in _descriptions().iterdir())


def target(name: str, devices: int = 1) -> Target:
    """The GPU `name`, one of `targets()`; of several, `Target.abstract` gives each a whole copy of what is not shared.

    Raises:
        ValueError: there is no description of that GPU.
        RuntimeError: jax finds no CUDA plugin, or its start failed; the message has the lines that help.
    """
    if name not in targets():
        raise ValueError(
            f"GPU {name!r} is not described, only {targets()}: add pallas_kernels/inspect/targets/{name}.txtpb."
        )
    description = _descriptions().joinpath(f"{name}.txtpb").read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology=f"1x1x{devices}")
    except NotImplementedError as error:
        plugin = f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
        raise RuntimeError(
            f"jax {jax.__version__} has no CUDA compiler here. Run: pip install --no-deps {plugin}; and start Python "
            "with JAX_PLATFORMS=cpu, or the plugin gives up where it finds no GPU."
        ) from error
    return Target(name, Mesh(np.array(topology.devices), ("device",)))


def compile_for(
    target: Target, function: Any, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any
) -> Compiled:
    """Lower and compile a jitted `function` for `target`.

    Args:
        function: result of `jax.jit`.
        args, kwargs: the function's: abstract (`target.abstract`), concrete, or static.
        options: XLA's compiler options, by name.
    """
    with jax.set_mesh(target.mesh):  # tells Pallas and cuDNN's lowering which GPU it is
        started = time.perf_counter()
        lowered = function.lower(*args, **kwargs)
        lowered_at = time.perf_counter()
        compiled = lowered.compile(compiler_options=options)
        done = time.perf_counter()
    memory = compiled.memory_analysis()
    return Compiled(
        lower_seconds=lowered_at - started,
        compile_seconds=done - lowered_at,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        hlo=compiled.as_text(),
    )


def kernels(target: Target, function: Any, *args: Any, **kwargs: Any) -> tuple[Compiled, list[Kernel]]:
    """As `compile_for`, with what the program's own kernels (not those of libraries) take and do.

    First come those that XLA assembles, then Mosaic GPU's, which assembles on its own, then jax-triton's, which the
    driver would assemble. Where no CUDA toolkit is, Mosaic says on stderr that it found no nvdisasm: nothing depends on
    that.

    Raises:
        RuntimeError: ptxas or nvdisasm is missing; the message has the line that installs them.
    """
    ptxas, nvdisasm = _tool("ptxas"), _tool("nvdisasm")
    with tempfile.TemporaryDirectory() as xla, tempfile.TemporaryDirectory() as mosaic:
        options = {"xla_dump_to": xla, "xla_dump_emitter_re": "ptx"}
        with _environment("MOSAIC_GPU_DUMP_TO", mosaic):  # read at every lowering and compilation
            compiled = compile_for(target, function, *args, options=options, **kwargs)
        launches = "".join(file.read_text() for file in Path(xla).glob("*.thunk_sequence.txt"))
        modules = [file.read_text() for file in sorted(Path(xla).glob("*.ptx"))]
        launched = re.findall(r"kCustomKernel.*?\] (\S+) grid.*?threads: \[(\d+),.*?shared_memory: (\d+)", launches)
        for file in sorted(Path(mosaic).glob("*.ptx"), key=lambda file: int(file.stem.rpartition("_")[2])):
            modules.append(file.read_text())
            launched.append(_mosaic_launch(modules[-1], file.with_suffix(".mlir-passes.log")))
    with jax.set_mesh(target.mesh):
        for ptx, launch in _jax_triton(function.lower(*args, **kwargs)):
            modules.append(ptx)
            launched.append(launch)
    threads, shared = ({entry[0]: int(entry[i]) for entry in launched} for i in (1, 2))
    own = [
        kernel for ptx in modules if ".entry" in ptx for kernel in disassemble(ptx, threads, shared, ptxas, nvdisasm)
    ]
    return compiled, own


def _mosaic_launch(ptx: str, passes: Path) -> tuple[str, str, str]:
    """Name, threads of a block and bytes of its shared memory, of the one kernel in a module of Mosaic's."""
    kernel = re.search(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, re.S)
    with passes.open() as lines:  # 0.1 GB: the module after each pass; constants are folded after the first ones
        shared = next(
            filter(None, (re.search(r"dynamic_shared_memory_size %c(\d+)_i32", line) for line in lines)), None
        )
    assert kernel is not None and shared is not None, "Mosaic's dumps have changed"
    return kernel[1], kernel[2], shared[1]


def _jax_triton(lowered: Any) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """PTX of every kernel that jax-triton launches, with its name, threads of a block and bytes of shared memory.
    XLA passes it on unread, within a protocol buffer whose fields these are: name, warps, shared memory, PTX."""
    calls = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        target = operation.attributes["call_target_name"] if operation.name == "stablehlo.custom_call" else ""
        if "triton_kernel_call" in str(target):  # Pallas's has another name
            calls.append(zlib.decompress(ir.StringAttr(operation.attributes["backend_config"]).value_bytes))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    number = rb"[\x80-\xff]*[\x00-\x7f]"
    fields = rb"(\w+)\x10([\x01-\x20])\x18(" + number + rb')"' + number + rb"(//\n// Generated by LLVM.*?\n}\n)"
    for call in calls:
        for name, warps, shared, ptx in re.findall(fields, call, re.DOTALL):
            size = sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(shared))
            yield ptx.decode(), (name.decode(), 32 * warps[0], size)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def blocks_per_sm(kernel: Kernel, target: Target) -> int:
    """How many blocks of a kernel one multiprocessor of the target holds at once (CUDA's occupancy rules)."""
    registers, shared, threads = (
        _figure(target.name, f"{name}_per_core{limit}")
        for name, limit in (("registers", "_limit"), ("shared_memory", ""), ("threads", "_limit"))
    )
    of_warp = -(-kernel.registers * 32 // 256) * 256  # registers are handed out by 256
    return min(
        registers // (of_warp * kernel.warps),
        shared // (kernel.shared_bytes + 1024),  # the driver keeps 1 kB of each block
        threads // (32 * kernel.warps),
    )


def _figure(gpu: str, name: str) -> int:
    figure = re.search(rf"\b{name}: (\d+)", _descriptions().joinpath(f"{gpu}.txtpb").read_text())
    assert figure is not None, name
    return int(figure[1])


def _tool(name: str) -> Path:
    """One of CUDA's programs, from NVIDIA's wheels or a toolkit."""
    wheels = find_spec("nvidia")
    folders = [Path(path, "cu13", "bin") for path in (wheels.submodule_search_locations or [])] if wheels else []
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise RuntimeError(
        f"No {name} in {[str(folder) for folder in folders]}. Run: pip install --no-deps "
        "'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-nvdisasm==13.2.*'"
    )


def _descriptions() -> Any:
    return files("pallas_kernels.inspect").joinpath("targets")
