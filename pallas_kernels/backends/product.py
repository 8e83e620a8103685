"""The contract between `products` and the backends that multiply 8-bit operands."""

from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.backends.base import A, Device

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
    out_scale: Float[A, " M"] | None

    @property
    def x(self) -> Num[A, "M _"]:
        return self.pairs[0][0]

    @property
    def columns(self) -> int:
        """How many the result has."""
        return self.pairs[0][1].shape[1] if self.heads is None else self.heads.shape[0] * self.head_dim

    @property
    def abstract(self) -> "Product[jax.ShapeDtypeStruct]":
        """The same of shapes alone, which a jitted function can be told apart by."""

        def shape(x: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x

        return Product(**{field.name: jax.tree.map(shape, getattr(self, field.name)) for field in fields(self)})


@runtime_checkable
class ComputesProducts(Protocol):
    def lacks_product(self, product: Product[Any], device: Device) -> str | None:
        """Why it cannot compute a product on this device. None: it can."""
        ...

    def product(self, product: Product[Array], *, interpret: bool) -> Num[Array, "M E"]: ...


def finished(
    values: Float[Array, "M E"], product: Product[Any], inverse: Float[Array, "M _"] | None
) -> Num[Array, "M E"]:
    """Activation, then the dtype of the result, saturated where it has 8 bits.

    Args:
        inverse: of each row's `out_scale`.
    """
    if product.activation == "gelu_tanh":  # as one tanh, which the GPU has
        inner = values * (0.7978845608 + 0.0356774081 * values * values)
        values = 0.5 * values + 0.5 * values * jnp.tanh(inner)
    if inverse is not None:
        most = float(jnp.finfo(product.out_dtype).max)
        values = jnp.clip(values * inverse, -most, most)
    return values.astype(product.out_dtype)
