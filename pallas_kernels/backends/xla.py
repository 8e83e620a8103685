"""Products of 8-bit operands by XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from pallas_kernels.backends.product import Product, finished


def quantized_matmul(product: Product[Array]) -> Num[Array, "M E"]:
    """cuBLAS where the GPU has 8-bit products, anywhere else in another type."""

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
    return finished(values, product, None if product.out_scale is None else 1 / product.out_scale[:, None])
