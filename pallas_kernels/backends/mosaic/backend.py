"""What the Mosaic GPU kernels compute, and what for. The kernels need jax 0.11, so they are imported where they run."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.backends.base import ComputesDense, Device, Problem
from pallas_kernels.backends.product import Product
from pallas_kernels.backends.registry import backend_named
from pallas_kernels.layout import FULL, Layout

MEASURED = {
    64: ": 1.01 to 1.26 times as fast as 'triton' for full, narrow and mixed heads",
    128: ": 1.40 to 1.57 times as fast as 'triton' for full, narrow and mixed heads",
}
"""Speed on an H100, by head_dim (benchmarks/results/attention_h100.json)."""


class Mosaic:
    interpretable = True

    def lacks(self, problem: Problem[Any], device: Device) -> str | None:
        if jax.__version_info__ < (0, 11):
            return f"the Mosaic kernel needs jax 0.11 or newer (Python 3.12), this is {jax.__version__}"
        if problem.head_dim not in (64, 128):
            return f"the Mosaic kernel is built for a head_dim of 64 and 128, not {problem.head_dim}"
        if problem.dtype not in (jnp.bfloat16, jnp.float16):
            return f"the Mosaic kernel takes bfloat16 and float16, not {jnp.dtype(problem.dtype).name}"
        if device.capability is not None and int(device.capability) != 9:
            return f"the Mosaic kernel is for compute capability 9 (Hopper), not {device.capability}"
        if not problem.has_every_query:
            q, k = problem.q, problem.k
            return f"the Mosaic kernel needs every query: {q.shape[1]=} but {k.shape[1]=}"
        return device.no_gpu

    def merit(self, problem: Problem[Any], device: Device) -> str | None:
        if device.generation != "hopper":
            return None
        if problem.operation != "dense":
            return f"for Hopper{MEASURED.get(problem.head_dim, '')}"
        if problem.head_dim != 64 or device.count > 1:
            return None  # on several GPUs a jit of sharded arrays would gather them for a kernel that XLA cannot split
        return "for one Hopper GPU: 1.17 to 1.21 times as fast as cuDNN, which computes gradients"

    def arrow(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "*L B T N H"]:
        from pallas_kernels.backends.mosaic.arrow import arrow_attention

        return arrow_attention(problem, interpret=interpret)

    def nested(
        self, problem: Problem[Array], half_windows: Int[Array, " W"], *, interpret: bool
    ) -> Float[Array, "W+1 B T N H"]:
        from pallas_kernels.backends.mosaic.nested import nested_arrow_attention

        return nested_arrow_attention(problem, half_windows, interpret=interpret)

    def lacks_product(self, product: Product[Any], device: Device) -> str | None:
        """Why it cannot compute a product on this device. None: it can."""
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

    def product(self, product: Product[Array], *, interpret: bool) -> Num[Array, "M E"]:
        from pallas_kernels.backends.mosaic.matmul import quantized_matmul

        return quantized_matmul(product, interpret=interpret)

    def dense(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "B T N H"]:
        arguments = problem.q, problem.k, problem.v, problem.text_length
        return jnp.asarray(_dense_mosaic(*arguments, problem.layout, interpret))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _dense_mosaic(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    text_length: Int[Array, " B"] | None,
    layout: Layout,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    full, arrays = jnp.full(q.shape[2], FULL, jnp.int32), {"q": q, "k": k, "v": v, "text_length": text_length}
    problem = Problem(operation="arrow", **arrays, layout=layout, half_window=full)
    return Mosaic().arrow(problem, interpret=interpret)


def _dense_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    text_length: Int[Array, " B"] | None,
    layout: Layout,
    interpret: bool,
) -> tuple[Float[Array, "B T N H"], Any]:
    """Where it is differentiated, another backend computes all of it."""
    name = "blockwise" if interpret or (text_length is not None and layout.text_first) else "cudnn"
    differentiable = backend_named(name)
    assert isinstance(differentiable, ComputesDense)

    def attend(q: Array, k: Array, v: Array) -> Array:
        problem = Problem(operation="dense", q=q, k=k, v=v, layout=layout, text_length=text_length)
        return differentiable.dense(problem, interpret=False)

    return jax.vjp(attend, q, k, v)


def _dense_backward(layout: Layout, interpret: bool, pull_back: Any, cotangent: Array) -> tuple[Any, ...]:
    return *pull_back(cotangent), None


_dense_mosaic.defvjp(_dense_forward, _dense_backward)
