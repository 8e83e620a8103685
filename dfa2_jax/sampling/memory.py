"""Where attention keeps what it remembers from step to step."""

import re
import sys
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from dfa2_jax.nn.attention import Attend, AttentionCall, stacks
from dfa2_jax.parallel.mesh import DeviceMesh
from pallas_kernels import Layout


def stack_shapes(
    layers: tuple[AttentionCall, ...],
    batch: int,
    heads: tuple[int, int],
    dtype: DTypeLike,
    mesh: DeviceMesh | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """By stack, the outputs of its attention layers: [L, B, T, N, H].

    Args:
        batch: of the transformer, twice the images under classifier-free guidance.
        heads: their number and their size.
        mesh: of devices that have a share each.
    """

    def shape(number: int, layout: Layout) -> jax.ShapeDtypeStruct:
        length, sharding = (layout.length, None) if mesh is None else (mesh.padded_length(layout), mesh.memory)
        return jax.ShapeDtypeStruct((number, batch, length, *heads), dtype, sharding=sharding)

    return {name: shape(len(numbers), layers[numbers[0]].layout) for name, numbers in stacks(layers).items()}


def empty_memory(attend: Attend, shapes: dict[str, jax.ShapeDtypeStruct], *, images: int) -> dict[str, Any]:
    """What an `Attend` remembers before the first step, by stack.

    Raises:
        MemoryError: it does not fit; the message says what would.
    """
    devices = max((shape.sharding.num_devices for shape in shapes.values() if shape.sharding is not None), default=1)
    remembered = jax.eval_shape(lambda: {name: attend.memory(shape) for name, shape in shapes.items()})
    check_fits(remembered, images=images, devices=devices)
    return {name: remembered for name, shape in shapes.items() if (remembered := attend.memory(shape)) is not None}


def check_fits(memory: Any, *, images: int, devices: int = 1) -> None:
    """Whether there is room for another memory of this size.

    Args:
        devices: that have equal shares of it.

    Raises:
        MemoryError: there is not; the message says what would fit.
    """
    arrays = jax.tree.leaves(memory)
    need, free = sum(x.size * x.dtype.itemsize for x in arrays) // devices, free_bytes()
    if need > free:
        fitting = int(free / need * images)
        smaller = f"one image takes {need / images / 1e9:.1f} GB: take a smaller one, or dense attention"
        advice = f"a batch of {fitting} would fit" if fitting else smaller
        tokens = max(x.shape[2] for x in arrays)
        raise MemoryError(
            f"Attention keeps {need / 1e9:.1f} GB from step to step for {images} images of {tokens} tokens"
            f"{f' on each of {devices} devices' if devices > 1 else ''}, and {free / 1e9:.1f} GB are free: {advice}."
        )


def free_bytes() -> int:
    """What the fullest device can still hold; of a CPU's memory, what programs can get without swapping."""
    if stats := [stats for device in jax.local_devices() if (stats := device.memory_stats())]:
        return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    meminfo = Path("/proc/meminfo")  # Linux alone
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return int(available[1]) * 1024 if available else sys.maxsize
