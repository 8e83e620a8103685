"""What stands between products and attention, in one pass each: norms with 8-bit results, norms with rotary positions.

Modulations are here, too: products of a row or two with weights of 8 bits. On NVIDIA GPUs all are Triton kernels. XLA
makes two to five fusions of each pass (docs: quantization).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.backends import passes
from pallas_kernels.backends.base import Device
from pallas_kernels.backends.passes import QKV, ComputesPasses, ScaleAndShift
from pallas_kernels.backends.passes import Projected as Projected
from pallas_kernels.backends.passes import Rope as Rope
from pallas_kernels.backends.passes import layer_norm as layer_norm
from pallas_kernels.backends.passes import rms_norm as rms_norm
from pallas_kernels.backends.passes import rotate as rotate
from pallas_kernels.backends.registry import backend_named

IMPLEMENTATIONS = ("triton", "xla")
FEW = 4
"""Rows that a product of weights alone has in registers."""
WIDEST = 8192
"""A row lies in one program's registers: 64 values a thread."""


@jax.enable_x64(False)
def quantized_rows(
    x: Float[Array, "*dims D"],
    dtype: DTypeLike,
    modulation: ScaleAndShift | None = None,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Num[Array, "*dims D"], Float[Array, "*dims"]]:
    """Values of 8 bits, and a float32 scale for each row: its largest magnitude becomes 127, or 448 of float8.

    Args:
        dtype: int8 or float8_e4m3fn.
        modulation: scale and shift of an adaptive layer norm, which rows [B, T, D] go through first. Each image has its
            own, or all have one.
        implementation: "triton", for int8 of 16-bit rows, or "xla". None: the best for the device.
        interpret: run the kernel on any device, slowly, for tests.

    Raises:
        ValueError: there is no such implementation, or shapes contradict each other; the message shows both.
        NotImplementedError: the named implementation cannot do this.
    """
    if modulation is not None:
        _check("scale and shift", modulation, (x.shape[0], 1, x.shape[-1]), (1, 1, x.shape[-1]))
    lacking = None
    if jnp.dtype(dtype) != jnp.int8:
        lacking = f"it writes int8, not {jnp.dtype(dtype)}"
    elif x.shape[-1] > WIDEST:
        lacking = f"it takes rows of {WIDEST} values at most, not {x.shape[-1]}"
    if kernels := _kernels(x, lacking, implementation, interpret):
        return kernels.quantized_rows(x, modulation, interpret=interpret)
    if modulation is not None:
        scale, shift = modulation
        x = passes.layer_norm(x) * (1 + scale) + shift
    return passes.quantized_rows(x, dtype)


@jax.enable_x64(False)
def normed_qkv(
    streams: Sequence[Projected],
    rope: Rope | None = None,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> QKV:
    """Queries, keys and values of one or two streams as one sequence: normed by head, rotated, each head in its place.

    Heads that the streams do not name hold anything.

    Args:
        streams: in the order of the sequence, with the same heads.
        rope: of all positions of the sequence; None: queries and keys are not rotated.
        implementation: "triton", for 16 bits and head dims of 64 or 128, or "xla". None: the best for the device.
        interpret: run the kernel on any device, slowly, for tests.

    Raises:
        ValueError: there is no such implementation, or shapes contradict each other; the message shows both.
        NotImplementedError: the named implementation cannot do this.
    """
    heads, which = streams[0].heads, streams[0].which
    batch, _, _, dim = heads.shape
    made = streams[0].num_heads if which is None else len(which)
    for stream in streams:
        _check("heads", [stream.heads], (batch, stream.heads.shape[1], 3 * made, dim))
        _check("norms", stream.norms or (), (dim,))
    _check("rope", rope or (), (sum(stream.heads.shape[1] for stream in streams), dim // 2))
    lacking = None if heads.shape[-1] in (64, 128) else f"it takes heads of 64 or 128, not {heads.shape[-1]}"
    if kernels := _kernels(heads, lacking, implementation, interpret):
        return kernels.normed_qkv(streams, rope, interpret=interpret)
    return passes.normed_qkv(streams, rope)


@jax.enable_x64(False)
def weight_only_matmul(
    x: Float[Array, "M K"],
    w: Int[Array, "L E K"],
    column_scale: Float[Array, "L E"],
    bias: Float[Array, "L E"] | None = None,
    *,
    layer: Int[Array, ""] | int,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "M E"]:
    """`(x @ w[layer].T) * column_scale + bias` of int8 weights, which become as wide as `x` in the product.

    Args:
        implementation: "triton", for four rows at most of 16 bits, which reads the weights where they lie, or "xla".
            None: the best for the device.
        interpret: run the kernel on any device, slowly, for tests.

    Raises:
        ValueError: there is no such implementation, or shapes contradict each other; the message shows both.
        NotImplementedError: the named implementation cannot do this.
    """
    (rows, depth), (layers, columns, _), layer = x.shape, w.shape, jnp.asarray(layer, jnp.int32)
    _check("w", [w], (layers, columns, depth))
    _check("column_scale and bias", [column_scale, *([] if bias is None else [bias])], (layers, columns))
    lacking = None
    if rows > FEW or depth % 128 or columns % 16 or w.size >= 2**31:
        lacking = f"it takes {FEW} rows at most, sums of 128 values and 16 columns, not {(*x.shape, columns)}"
    if kernels := _kernels(x, lacking, implementation, interpret):
        return kernels.few_rows(x, w, column_scale, bias, layer, interpret=interpret)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = jnp.dot(x, w[layer].astype(x.dtype).T, precision=precision).astype(jnp.float32) * column_scale[layer][None]
    return (out if bias is None else out + bias[layer].astype(jnp.float32)[None]).astype(x.dtype)


def _check(name: str, arrays: Iterable[Array], *shapes: tuple[int, ...]) -> None:
    """Kernels read what shapes say, beyond the end of an array, too."""
    for array in arrays:
        if array.shape not in shapes:
            raise ValueError(f"{name} must be {' or '.join(str(list(shape)) for shape in shapes)}, got {array.shape}.")


def _kernels(x: Array, lacking: str | None, implementation: str | None, interpret: bool) -> ComputesPasses | None:
    """The backend that has the kernels; None: XLA is to compute.

    Args:
        lacking: why the kernel cannot, if so.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}.")
    if interpret and implementation != "triton":
        raise ValueError(f"{interpret=} is for the kernel, implementation='triton', not {implementation!r}.")
    device = Device.current()
    if lacking is None and jnp.dtype(x.dtype).itemsize != 2:
        lacking = f"it takes 16 bits, not {x.dtype}"
    if lacking is None and x.size >= 2**31:
        lacking = f"it counts values in 32 bits, and {x.shape} are more"
    lacking = lacking or replace(device, interpreted=interpret).no_gpu
    if lacking and implementation == "triton":
        raise NotImplementedError(f"{implementation=}: {lacking}; pass implementation='xla'.")
    if lacking or implementation == "xla":
        return None
    backend = backend_named("triton")
    return backend if isinstance(backend, ComputesPasses) else None
