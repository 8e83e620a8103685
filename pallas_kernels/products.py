"""`quantized_matmul`: products of 8-bit operands, with scales, bias and activation in one pass."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.backends import xla
from pallas_kernels.backends.base import Device
from pallas_kernels.backends.product import EIGHT_BITS, Activation, ComputesProducts, Product
from pallas_kernels.backends.registry import backend_named
from pallas_kernels.checks import check_int32
from pallas_kernels.devices import BackendChoice

IMPLEMENTATIONS = ("mosaic", "xla")


@jax.enable_x64(False)
def quantized_matmul(
    x: Num[Array, "M K"],
    w: Num[Array, "*L E K"],
    row_scale: Float[Array, "#M"],
    column_scale: Float[Array, "*L E"],
    bias: Float[Array, "*L E"] | None = None,
    *,
    layer: Int[Array, ""] | int | None = None,
    second: tuple[Num[Array, "M K2"], Num[Array, "*L E K2"]] | None = None,
    heads: Int[Array, " n"] | None = None,
    head_dim: int = 128,
    activation: Activation = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    out_scale: Float[Array, "#M"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Num[Array, "M columns"]:
    """`activation((x @ w.T) * row_scale * column_scale + bias)` of 8-bit operands, for inference.

    Sums are float32, of integers int32. Hopper's own of float8 have fewer bits: 0.0025 of the result at K = 12,288.

    Args:
        x, w: float8_e4m3fn or int8, both. The weights are [E, K], or a stack of them over layers with `layer`, the one
            to use, which is read where it lies.
        row_scale: of each row of `x`, or one for all; float32.
        column_scale: of each column of the result; float32.
        second: another `x` and `w` with the same scales, whose product is added.
        heads: columns by heads of `head_dim`: those that the result has, int32. None: all columns.
        activation: None, or "gelu_tanh".
        out_dtype: float8_e4m3fn is divided by `out_scale`, of each row or one for all, and saturates. It is never NaN.
        implementation: "mosaic" or "xla". None: the best for the device: "mosaic" on Hopper, where shapes allow.
        interpret: run the kernel on any device, slowly, for tests.

    Raises:
        ValueError: arguments that contradict each other; the message shows both values.
        NotImplementedError: the named implementation cannot do this.
    """
    product = checked(
        x, w, row_scale, column_scale, bias, layer, second, heads, head_dim, activation, out_dtype, out_scale
    )
    device = Device.current()
    name = implementation or choose_product(product, device).implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is not one of {IMPLEMENTATIONS}.")
    if interpret and name != "mosaic":
        raise ValueError(f"{interpret=} is for the kernel, implementation='mosaic', not {name!r}.")
    if name == "xla":
        return xla.quantized_matmul(product)
    if why := mosaic_lacks(product, replace(device, interpreted=interpret)):
        raise NotImplementedError(f"implementation={name!r}: {why}; pass implementation='xla'.")
    backend = backend_named(name)
    assert isinstance(backend, ComputesProducts)
    return backend.product(product, interpret=interpret)


def checked(
    x: Array,
    w: Array,
    row_scale: Array,
    column_scale: Array,
    bias: Array | None,
    layer: Array | int | None,
    second: tuple[Array, Array] | None,
    heads: Array | None,
    head_dim: int,
    activation: Activation,
    out_dtype: DTypeLike,
    out_scale: Array | None,
) -> Product[Array]:
    """Raises ValueError, as `quantized_matmul`."""
    pairs = ((x, w), *(() if second is None else (second,)))
    _check_pairs(pairs, 2 if layer is None else 3)
    if out_scale is not None and out_scale.shape not in ((1,), x.shape[:1]):
        raise ValueError(f"out_scale must be [{x.shape[0]}] or [1], got {out_scale.shape}.")
    if row_scale.shape not in ((1,), x.shape[:1]) or column_scale.shape != w.shape[:-1]:
        raise ValueError(
            f"scales must be [{x.shape[0]}] or [1], and {list(w.shape[:-1])}, "
            f"got {row_scale.shape}, {column_scale.shape}."
        )
    if bias is not None and bias.shape != w.shape[:-1]:
        raise ValueError(f"bias must be {list(w.shape[:-1])} as the columns, got {bias.shape}.")
    if heads is not None:
        check_int32("heads", heads, (heads.size,))
        if w.shape[-2] % head_dim:
            raise ValueError(f"{w.shape[-2]} columns are no heads of {head_dim=}.")
    if activation not in (None, "gelu_tanh"):
        raise ValueError(f"{activation=} is neither None nor 'gelu_tanh'.")
    if (jnp.dtype(out_dtype) in EIGHT_BITS) != (out_scale is not None) or jnp.dtype(out_dtype) == jnp.int8:
        given = "no out_scale" if out_scale is None else "an out_scale"
        raise ValueError(f"out_scale is of out_dtype=float8_e4m3fn, got {given} and {jnp.dtype(out_dtype)}.")

    def stacked(array: Array) -> Array:
        return array[None] if layer is None else array

    def of_rows(scale: Array) -> Array:
        return jnp.broadcast_to(scale, x.shape[:1]).astype(jnp.float32)

    return Product(
        pairs=tuple((a, stacked(b)) for a, b in pairs),
        row_scale=of_rows(row_scale),
        column_scale=stacked(column_scale.astype(jnp.float32)),
        bias=None if bias is None else stacked(bias),
        layer=jnp.asarray(0 if layer is None else layer, jnp.int32),
        heads=heads,
        head_dim=head_dim,
        activation=activation,
        out_dtype=jnp.dtype(out_dtype),
        out_scale=None if out_scale is None else of_rows(out_scale),
    )


def _check_pairs(pairs: Sequence[tuple[Array, Array]], dims: int) -> None:
    (x, w), *_ = pairs
    for a, b in pairs:
        if a.dtype not in EIGHT_BITS or {a.dtype, b.dtype} != {x.dtype}:
            raise ValueError(f"x and w must be float8_e4m3fn or int8, all of them, got {a.dtype} and {b.dtype}.")
        if a.ndim != 2 or b.ndim != dims or a.shape[1] != b.shape[-1]:
            raise ValueError(f"x and w must be [M, K] and {'[L, ' * (dims - 2) or '['}E, K], got {a.shape}, {b.shape}.")
        if a.shape[0] != x.shape[0] or b.shape[:-1] != w.shape[:-1]:
            raise ValueError(f"both pairs must have one result, got {x.shape} x {w.shape} and {a.shape} x {b.shape}.")


def mosaic_lacks(product: Product[Any], device: Device) -> str | None:
    """Why the kernel cannot compute a product, if so. A backend that cannot be imported lacks itself."""
    try:
        backend = backend_named("mosaic")
    except ImportError as error:
        return f"the backend 'mosaic' cannot be imported: {error}"
    if not isinstance(backend, ComputesProducts):
        return "the backend 'mosaic' computes no products"
    return backend.lacks_product(product, device)


def choose_product(product: Product[Any], device: Device) -> BackendChoice:
    """The best implementation for a product."""
    if device.generation != "hopper":
        return BackendChoice("xla", f"the default device is {device.name!r}, not a Hopper GPU")
    if why := mosaic_lacks(product, device):
        return BackendChoice("xla", why)
    return BackendChoice("mosaic", "for Hopper: 1.4 to 1.9 times as fast as XLA's with its scales (docs: quantization)")


def product_implementation(dtype: DTypeLike, depth: int = 3072, columns: int = 3072) -> BackendChoice:
    """The backend that a product of many rows of 8 bits runs on."""
    rows, array = 4096, jax.ShapeDtypeStruct
    product = Product(
        pairs=((array((rows, depth), dtype), array((1, columns, depth), dtype)),),
        row_scale=array((rows,), jnp.float32),
        column_scale=array((1, columns), jnp.float32),
        bias=None,
        layer=array((), jnp.int32),
        heads=None,
        head_dim=128,
        activation=None,
        out_dtype=jnp.dtype(jnp.bfloat16),
        out_scale=None,
    )
    return choose_product(product, Device.current())
