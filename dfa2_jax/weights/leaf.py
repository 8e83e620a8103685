"""A parameter as stored, and how it becomes one array.

A parameter is loaded straight into its final array: on the host by slabs of a few megabytes, on an accelerator by
layers. The peak of memory is the final arrays and little more, whatever the size of the checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfa2_jax.io.errors import CheckpointError

HOST_BYTES = 8_000_000
"""Smaller parameters are put together on the host: one transfer, and no program to compile."""

SLAB_BYTES = 2**22
"""What is read, turned and cast at once on the host."""


@dataclass(frozen=True)
class Block:
    """Rows of a parameter's leading axis, `start` to `start + len(read())`: no block of a transformer.

    source: names where the rows come from.
    """

    source: str
    start: int
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Leaf:
    """One parameter as stored: `blocks` cover its leading axis; of one with a layer axis, a block is one layer."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Sequence[Block]


def is_finite(x: np.ndarray) -> bool:
    """Whether a contiguous array holds neither NaN nor infinity.

    Two maxima over the bits, as signed and as unsigned integers, find both signs. On a slab in the cache they read
    25 GB/s in every dtype, where `np.isfinite` reads 16-bit floats at 1 GB/s.
    """
    if np.issubdtype(x.dtype, np.integer):
        return True
    bits = x.view(f"u{x.dtype.itemsize}")
    infinity = int(np.asarray(np.inf, x.dtype).view(bits.dtype))
    sign = 1 << (8 * x.dtype.itemsize - 1)
    signed = bits.view(f"i{x.dtype.itemsize}")
    return bool(signed.max(initial=0) < infinity and bits.max(initial=0) < sign + infinity)


def not_finite_error(block: Block, dtype: np.dtype) -> CheckpointError:
    """Names the source; says whether its own values are broken or `dtype` is too narrow for them."""
    if is_finite(np.ascontiguousarray(block.read())):
        return CheckpointError(
            f"{block.source} holds values that are not finite in {dtype.name}: load or convert it with dtype=bfloat16."
        )
    return CheckpointError(f"{block.source} holds NaN or infinity: download the file, or convert it, again.")


@cache
def cpu_device() -> Any:
    """A jax.Device, or None where JAX_PLATFORMS names only others."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def slabs(block: Block, dtype: np.dtype) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The block as contiguous arrays of `dtype`, in order, each with its place in the parameter.

    Slabs are small because malloc keeps what is freed below its threshold (32 MB at most), in a heap per thread. A
    jax.Array on CPU turns a strided view at 1.5 GB/s a core: five times as fast as NumPy and as XLA's own transpose.
    NumPy casts as fast as XLA does, and compiles nothing.
    """
    rows = block.read()
    axis = 1 if rows.ndim > 1 and rows.shape[0] == 1 else 0
    start = block.start if axis == 0 else 0
    for part in np.array_split(rows, min(-(-rows.nbytes // SLAB_BYTES), rows.shape[axis]), axis=axis):
        turned = np.ascontiguousarray(part) if (cpu := cpu_device()) is None else np.asarray(jax.device_put(part, cpu))
        with np.errstate(over="ignore"):  # reported below, by name
            turned = turned.astype(dtype, copy=False)
        if not is_finite(turned):
            raise not_finite_error(block, dtype)
        index = slice(start, start := start + part.shape[axis])
        yield (slice(block.start, block.start + 1), index)[1 - axis :], turned


def on_host(leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    """The whole parameter, aligned so that a jax.Array on CPU can share its memory."""
    nbytes = int(np.prod(leaf.shape)) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    array = memory[-memory.ctypes.data % 64 :][:nbytes].view(dtype).reshape(leaf.shape)
    for block in leaf.blocks:
        for index, rows in slabs(block, dtype):
            array[index] = rows
    return array


@partial(jax.jit, donate_argnums=0, static_argnames="axes")
def write_rows(
    target: jax.Array, rows: jax.Array, start: jax.Array, *, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """`target` with `rows.transpose(axes)` from `start` on, in place; and whether they are finite."""
    rows = rows.transpose(axes).astype(target.dtype)
    return jax.lax.dynamic_update_slice_in_dim(target, rows, start, axis=0), jnp.isfinite(rows).all()


def on_accelerator(leaf: Leaf, dtype: np.dtype) -> jax.Array:
    """The whole parameter, filled block by block: the bytes go over as they lie in the file and turn there."""
    array = jnp.zeros(leaf.shape, dtype)
    for block in leaf.blocks:
        rows = block.read()
        order = np.argsort([-stride for stride in rows.strides], kind="stable").tolist()
        axes = tuple(np.argsort(order).tolist())
        array, finite = write_rows(array, jax.device_put(rows.transpose(order)), np.int32(block.start), axes=axes)
        if not finite:  # this waits for the block, else blocks pile up in memory faster than they are written
            raise not_finite_error(block, dtype)
    return array


def load_leaf(leaf: Leaf, dtype: np.dtype, *, on_device: bool) -> jax.Array | np.ndarray:
    """The parameter as one array.

    The host looks for values that are not finite slab by slab. This takes 0.08 s a gigabyte and core: 10 to 20 % of
    loading from the page cache. On an accelerator, the program that places a block looks for them.

    Raises:
        CheckpointError: a value is not finite in `dtype`.
    """
    if not on_device:
        return on_host(leaf, dtype)
    if jax.default_backend() == "cpu" or int(np.prod(leaf.shape)) * dtype.itemsize <= HOST_BYTES:
        return jax.device_put(on_host(leaf, dtype))
    return on_accelerator(leaf, dtype)
