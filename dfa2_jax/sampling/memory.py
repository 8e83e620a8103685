"""Where attention keeps what it remembers from step to step."""

from collections.abc import Collection
from typing import Any

import jax
from jax.typing import DTypeLike

from dfa2_jax.nn.attention import Attend, AttentionCall, stacks
from dfa2_jax.parallel.mesh import DeviceMesh
from dfa2_jax.weights.room import free_bytes
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
    shardings = [shape.sharding for shape in shapes.values() if shape.sharding is not None]
    devices = shardings[0].device_set if shardings else ()
    remembered = jax.eval_shape(lambda: {name: attend.memory(shape) for name, shape in shapes.items()})
    check_fits(remembered, images=images, devices=devices)
    return {name: remembered for name, shape in shapes.items() if (remembered := attend.memory(shape)) is not None}


def check_fits(memory: Any, *, images: int, devices: Collection[Any] = ()) -> None:
    """Whether there is room for another memory of this size.

    Args:
        devices: that have equal shares of it; of none, it is the default device's.

    Raises:
        MemoryError: there is not; the message says what would fit.
    """
    arrays = jax.tree.leaves(memory)
    need, free = sum(x.size * x.dtype.itemsize for x in arrays) // max(1, len(devices)), free_bytes(devices)
    if need > free:
        fitting = int(free / need * images)
        smaller = "take a smaller one, fewer frames of a video, or dense attention"
        smaller = f"one image takes {need / images / 1e9:.1f} GB: {smaller}"
        advice = f"a batch of {fitting} would fit" if fitting else smaller
        tokens = max(x.shape[2] for x in arrays)
        each = f" on each of {len(devices)} devices" if len(devices) > 1 else ""
        raise MemoryError(
            f"Attention keeps {need / 1e9:.1f} GB from step to step for {images} images of {tokens} tokens{each}, "
            f"and {free / 1e9:.1f} GB are free: {advice}."
        )
