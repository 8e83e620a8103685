"""`quantized_matmul`: products of 8-bit operands, with scales, bias and activation in one pass."""

from dataclasses import dataclass, replace
from typing import Any, Generic, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.backends.base import A, Device
from pallas_kernels.checks import check_int32
from pallas_kernels.devices import BackendChoice

EIGHT_BITS = (jnp.float8_e4m3fn, jnp.int8)

Activation = Literal["gelu_tanh"] | None


@dataclass(frozen=True, kw_only=True)
class Product(Generic[A]):
    """One call, checked: of arrays to compute, of `jax.ShapeDtypeStruct`s to ask about. Fields as in the function."""

    pairs: tuple[tuple[Num[A, "M _"], Num[A, "L E _"]], ...]
    """Operands, whose products are added up: one pair, or two."""
    row_scale: Float[A, " M"]
    column_scale: Float[A, "L E"]
    """With named heads, of their columns alone."""
    bias: Float[A, "L E"] | None
    layer: Int[A, ""]
    heads: Int[A, " n"] | None
    head_dim: int
    activation: Activation
    out_dtype: Any
    out_scale: Float[A, ""] | None

    @property
    def x(self) -> Num[A, "M _"]:
        return self.pairs[0][0]

    @property
    def columns(self) -> int:
        """Of the output."""
        return self.pairs[0][1].shape[1] if self.heads is None else self.heads.shape[0] * self.head_dim


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
    out_scale: Float[Array, ""] | float | None = None,
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
        out_dtype: float8_e4m3fn is divided by `out_scale` and saturates; it never becomes NaN.
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
        return _by_xla(product)
    if why := mosaic_lacks(product, replace(device, interpreted=interpret)):
        raise NotImplementedError(f"implementation={name!r}: {why}; pass implementation='xla'.")
    from pallas_kernels.backends.mosaic.matmul import quantized_matmul as by_mosaic

    return by_mosaic(product, interpret=interpret)


IMPLEMENTATIONS = ("mosaic", "xla")


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
    out_scale: Array | float | None,
) -> Product[Array]:
    """Raises ValueError, as `quantized_matmul`."""
    pairs = ((x, w), *(() if second is None else (second,)))
    dims = 2 if layer is None else 3
    for a, b in pairs:
        if a.dtype not in EIGHT_BITS or {a.dtype, b.dtype} != {x.dtype}:
            raise ValueError(f"x and w must be float8_e4m3fn or int8, all of them, got {a.dtype} and {b.dtype}.")
        if a.ndim != 2 or b.ndim != dims or a.shape[1] != b.shape[-1]:
            raise ValueError(f"x and w must be [M, K] and {'[L, ' * (dims - 2) or '['}E, K], got {a.shape}, {b.shape}.")
        if a.shape[0] != x.shape[0] or b.shape[:-1] != w.shape[:-1]:
            raise ValueError(f"both pairs must have one result, got {x.shape} x {w.shape} and {a.shape} x {b.shape}.")
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
        raise ValueError(f"out_scale={out_scale} is of out_dtype=float8_e4m3fn, got {jnp.dtype(out_dtype)}.")

    def stacked(array: Array) -> Array:
        return array[None] if layer is None else array

    return Product(
        pairs=tuple((a, stacked(b)) for a, b in pairs),
        row_scale=jnp.broadcast_to(row_scale, x.shape[:1]).astype(jnp.float32),
        column_scale=stacked(column_scale.astype(jnp.float32)),
        bias=None if bias is None else stacked(bias),
        layer=jnp.asarray(0 if layer is None else layer, jnp.int32),
        heads=heads,
        head_dim=head_dim,
        activation=activation,
        out_dtype=jnp.dtype(out_dtype),
        out_scale=None if out_scale is None else jnp.asarray(out_scale, jnp.float32),
    )


def choose_product(product: Product[Any], device: Device) -> BackendChoice:
    """The best implementation for a product."""
    if device.generation != "hopper":
        return BackendChoice("xla", f"the default device is {device.name!r}, not a Hopper GPU")
    if why := mosaic_lacks(product, device):
        return BackendChoice("xla", why)
    return BackendChoice("mosaic", "for Hopper: 1.28 times as fast as XLA's with its scales (docs: quantization)")


def mosaic_lacks(product: Product[Any], device: Device) -> str | None:
    """Why the kernel cannot compute a product, if so."""
    if jax.__version_info__ < (0, 11):
        return f"the Mosaic kernel needs jax 0.11 or newer (Python 3.12), this is {jax.__version__}"
    if device.capability is not None and int(device.capability) != 9:
        return f"the Mosaic kernel is for compute capability 9 (Hopper), not {device.capability}"
    if any(x.shape[1] % 128 for x, _ in product.pairs) or product.columns % 128:
        shapes = [(*x.shape, product.columns) for x, _ in product.pairs]
        return f"the Mosaic kernel sums 128 values at a time, of 128 columns at least, not {shapes}"
    if jnp.dtype(product.out_dtype).itemsize > 2:
        return f"the Mosaic kernel gives 16 or 8 bits, not {jnp.dtype(product.out_dtype).name}"
    if product.x.shape[0] < 64:
        return f"the Mosaic kernel takes 64 rows at least, not {product.x.shape[0]}"
    if product.heads is not None and product.head_dim % 64:
        return f"the Mosaic kernel names heads of 64 or 128, not {product.head_dim}"
    return device.no_gpu


def finished(values: Float[Array, "M E"], product: Product[Any], inverse: Any) -> Num[Array, "M E"]:
    """Activation, then the dtype of the result, saturated where it has 8 bits.

    Args:
        inverse: what holds 1 / `out_scale` in its entry 0.
    """
    if product.activation == "gelu_tanh":  # as one tanh, which the GPU has
        inner = values * (0.7978845608 + 0.0356774081 * values * values)
        values = 0.5 * values + 0.5 * values * jnp.tanh(inner)
    if inverse is not None:
        most = float(jnp.finfo(product.out_dtype).max)
        values = jnp.clip(values * inverse[0], -most, most)
    return values.astype(product.out_dtype)


def _by_xla(product: Product[Array]) -> Num[Array, "M E"]:
    """Products by XLA: cuBLAS where the GPU has 8-bit ones, anywhere else in another type."""

    def of_layer(stack: Array) -> Array:
        array = jax.lax.dynamic_index_in_dim(stack, product.layer, keepdims=False)
        if product.heads is None:
            return array
        return array.reshape(-1, product.head_dim, *array.shape[1:])[product.heads].reshape(-1, *array.shape[1:])

    sums = jnp.int32 if product.x.dtype == jnp.int8 else jnp.float32
    along = (((1,), (1,)), ((), ()))
    totals = [jax.lax.dot_general(x, of_layer(w), along, preferred_element_type=sums) for x, w in product.pairs]
    values = sum(totals[1:], totals[0]).astype(jnp.float32)
    values = values * product.row_scale[:, None] * of_layer(product.column_scale)[None]
    if product.bias is not None:
        values = values + of_layer(product.bias)[None].astype(jnp.float32)
    return finished(values, product, None if product.out_scale is None else 1 / product.out_scale[None])
