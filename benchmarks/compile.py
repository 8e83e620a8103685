"""What XLA makes of the sampling loop of each published model on an NVIDIA H200, found without a GPU or weights.

    JAX_PLATFORMS=cpu python3.12 -m benchmarks.compile [--models FLUX.1-dev ...] [--pixels 1024 2048]

Compiles `dfa2_jax.sampling.loop.denoise` with its layers scanned and unrolled, and writes JSON and a Markdown table.
The number of steps is traced, the dtype is bfloat16, the batch is one image, and SD3 is guided. This takes about 10
minutes of CPU time, most of it for the unrolled programs. `pallas_kernels.inspect.aot` says what must be installed.
"""

import argparse
import json
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.sampling.loop import denoise
from pallas_kernels.inspect import aot
from pallas_kernels.inspect.hlo import weight_copies
from tests.real_shapes import PUBLISHED, denoise_arguments

GPU, BYTES_PER_SECOND = "h200", 4.8e12
NOTES = """\
Compiled for one {gpu} without a GPU, jax {jax}, cuDNN {cudnn}: `python -m benchmarks.compile`.

- Peak: arguments + temporaries + outputs - aliases. Weights are arguments; encoders and decoder are not counted.
- Copied per step: bytes of buffers that a denoising step fills with nothing but weights (`inspect.hlo`), chiefly slices
  that are taken out of a stack of layers before a matrix product reads them. `of weights` is their share of the model.
  They are read and written once: `costs` is that time at {rate} TB/s, had it nothing to hide behind.
- Attention is cuDNN's, for SD3's head_dim of 64 too, where one Hopper GPU runs Mosaic.
- Copied before the first step: {once} bytes at most. The largest buffer of such a copy: {largest:.0f} MB.
- Compile: wall seconds of two cores that had other work beside, and in brackets the CPU seconds it took.
"""


class Row(NamedTuple):
    """One compiled program. Sizes in bytes, times in seconds."""

    model: str
    pixels: int
    layers: str
    lower_seconds: float
    compile_seconds: float
    cpu_seconds: float
    """CPU time of lowering and compiling, over all threads. Other work on the machine hardly moves it."""
    hlo_bytes: int
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    weight_bytes: int
    copied_per_step: int
    copied_once: int
    largest_copy: int

    def markdown(self) -> str:
        gb, copied = 1e9, self.copied_per_step
        cells = (
            self.model,
            self.pixels,
            self.layers,
            f"{self.lower_seconds:.1f}",
            f"{self.compile_seconds:.0f} ({self.cpu_seconds:.0f})",
            f"{self.hlo_bytes / 1e6:.1f}",
            f"{self.peak_bytes / gb:.2f}",
            f"{self.temp_bytes / gb:.2f}",
            f"{copied / gb:.2f}",
            f"{copied / self.weight_bytes:.0%}",
            f"{2000 * copied / BYTES_PER_SECOND:.1f}",
        )
        return f"| {' | '.join(map(str, cells))} |"


HEADER = (
    "| model | px | layers | lower s | compile s | HLO MB | peak GB | temp GB | copied per step GB "
    "| of weights | costs ms |\n" + "|---" * 11 + "|"
)


def measure(target: aot.Target, layers: str, pixels: int, model: str) -> Row:
    jax.clear_caches()  # a lowering starts from nothing, as a user's first does
    graph, *arrays = denoise_arguments(model, pixels)
    params, *_ = arrays = target.abstract(arrays)
    unroll = layers == "unrolled" or 1
    started = time.process_time()
    compiled = aot.compile_for(target, denoise, graph, *arrays, unroll=unroll, implementation="cudnn")
    cpu_seconds = time.process_time() - started
    copies = weight_copies(compiled.hlo)
    return Row(
        model=model,
        pixels=pixels,
        layers=layers,
        lower_seconds=compiled.lower_seconds,
        compile_seconds=compiled.compile_seconds,
        cpu_seconds=cpu_seconds,
        hlo_bytes=len(compiled.hlo),
        argument_bytes=compiled.argument_bytes,
        temp_bytes=compiled.temp_bytes,
        peak_bytes=compiled.peak_bytes,
        weight_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        copied_per_step=sum(copy.num_bytes * copy.times for copy in copies if copy.in_loop),
        copied_once=sum(copy.num_bytes for copy in copies if not copy.in_loop),
        largest_copy=max((copy.num_bytes for copy in copies), default=0),
    )


def write(out: Path, rows: list[Row]) -> None:
    """`out`.json and `out`.md."""
    cudnn = version("nvidia-cudnn-cu13")
    plugins = {name: version(name) for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt")} | {"nvidia-cudnn-cu13": cudnn}
    record: dict[str, Any] = {"target": GPU, "machine": describe_machine(), "plugins": plugins}
    record["rows"] = [row._asdict() for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    notes = NOTES.format(
        gpu="NVIDIA H200",
        jax=jax.__version__,
        cudnn=cudnn,
        rate=BYTES_PER_SECOND / 1e12,
        once=max(row.copied_once for row in rows),
        largest=max(row.largest_copy for row in rows) / 1e6,
    )
    ordered = sorted(rows, key=lambda row: (list(PUBLISHED).index(row.model), row.pixels, row.layers))
    write_whole(out.with_suffix(".md"), "\n".join([notes, HEADER, *(row.markdown() for row in ordered)]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--pixels", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compile_h200"))
    args = parser.parse_args()
    target, rows = aot.target(GPU), []
    print(HEADER)
    for case in product(("scanned", "unrolled"), args.pixels, args.models):
        rows.append(measure(target, *case))
        print(rows[-1].markdown(), flush=True)
        write(args.out, rows)


if __name__ == "__main__":
    main()
