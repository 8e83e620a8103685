"""`arrow_attention` and `nested_arrow_attention`: check their arguments and pick an implementation."""

from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas  # noqa: F401 adds to jit's key (jax 0.12): no program's first trace may be what imports it
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import cost
from pallas_kernels.backends.triton.tiles import row_for, tiles_for
from pallas_kernels.checks import check_cache, check_heads, check_int32, check_tokens, concrete
from pallas_kernels.layout import FULL, Layout
from pallas_kernels.mask import EVERYTHING

IMPLEMENTATIONS = ("reference", "blockwise", "triton", "mosaic", "jax_triton", "cudnn")
KERNELS = ("triton", "mosaic", "jax_triton")

JAX_TRITON = {"jax-triton": "0.3.1", "triton": "3.6.0"}
"""What "jax_triton" was tested with, on jax 0.11.2. jax-triton 0.4 renames arguments, and the PTX of later Tritons is
too new for that jax's ptxas."""


def arrow_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    half_window: Int[Array, " N"] | None = None,
    *,
    layout: Layout,
    cache: Float[Array, "*L B T N H"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    head_order: Int[Array, " N"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "*L B T N H"]:
    """Attention of which each head is full, an arrow (local band, text dense) or cached (DiTFastAttnV2, section 3.1).

    Works under `jit`, `vmap`, `scan`, `cond`, and in `jax.shard_map(..., check_vma=False)` over heads or batch: JAX
    does not see through a kernel over which axes its output varies.

    Args:
        q, k, v: heads on the third axis, as in `jax.nn.dot_product_attention`; softmax scale `H ** -0.5`. The queries
            are the whole sequence, or (dense attention only) any rows of it.
        half_window: visual tokens kept on each side of the diagonal, per head; `FULL` (-1), `CACHED` (-2). It is data:
            another plan compiles nothing. None: dense attention, decided at trace time.
        layout: which positions are text.
        cache: the outputs that cached heads return, or a stack of them over layers with `layer`, the one to use. Where
            it is donated or a loop carries it, the result takes its buffer, and cached heads cost nothing. Without a
            cache, a cached head's output is NaN.
        head_order: a permutation of the heads, those with most work first: the order in which the kernels start
            them. The result does not depend on it. None: as they come.
        implementation: None picks the best for the device: for arrows "mosaic" on Hopper (16-bit, jax 0.11 or newer),
            "triton" on other NVIDIA GPUs and "blockwise" elsewhere; for dense attention "cudnn" (16-bit, NVIDIA),
            "mosaic" where it is faster (one Hopper GPU, head_dim 64; gradients are cuDNN's) and "blockwise".
            "jax_triton", with the extra `jax-triton`, is a kernel in Triton itself: it does not need Pallas's Triton,
            which JAX will drop. "reference" is for tests.
        interpret: run a kernel ("triton", "mosaic", "jax_triton") on any device, slowly, for tests.

    Returns:
        The output [B, T, N, H]; with a stack, the stack with this layer's entry replaced by the output.

    Raises:
        ValueError: arguments that contradict each other; the message shows both values. Those that only data shows
            (cached heads without a cache, a layer out of the stack) are seen outside of `jax.jit` alone; inside, such a
            layer is the nearest one of the stack.
        NotImplementedError: the named implementation cannot do this, or an arrow is differentiated.
    """
    check_tokens(q, k, v, layout)
    check_heads(q, k, half_window, head_order)
    check_cache(q, half_window, cache, layer)
    is_arrow = half_window is not None
    choose = arrow_implementation if is_arrow else dense_implementation
    choice = choose(q.dtype, q.shape[-1]).implementation
    if choice == "mosaic" and q.shape[1] != k.shape[1]:
        choice = "cudnn"  # some rows of the queries
    implementation = _supported(implementation or choice, q, is_arrow, interpret)
    if half_window is None:
        out = _dense(q, k, v, layout, implementation, interpret)
        return out if layer is None else jax.lax.dynamic_update_index_in_dim(cache, out, layer, 0)

    half_window = jnp.minimum(half_window, EVERYTHING)  # beyond, sums with positions overflow
    layer = None if layer is None or cache is None else jnp.clip(jnp.asarray(layer, jnp.int32), 0, cache.shape[0] - 1)

    q, k, v, cache = _constants((q, k, v, cache))
    backend, args = _backend(implementation), (q, k, v, half_window, layout, cache, layer)
    if implementation in ("triton", "jax_triton"):
        tiles = tiles_for(gpu_kind(), q.shape[-1], q.dtype)
        return backend.arrow_attention(*args, head_order, tiles, interpret=interpret)
    if implementation == "mosaic":
        return backend.arrow_attention(*args, head_order, interpret=interpret)
    if implementation == "blockwise":
        return backend.arrow_attention(*args)
    if layer is None:
        return backend.attention(q, k, v, half_window, layout, cache)
    entry = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
    out = backend.attention(q, k, v, half_window, layout, entry)
    return jax.lax.dynamic_update_index_in_dim(cache, out, layer, 0)


def _dense(q: Array, k: Array, v: Array, layout: Layout, implementation: str, interpret: bool) -> Array:
    if implementation == "mosaic":
        if q.shape[1] != k.shape[1]:
            raise NotImplementedError(f"{implementation=} needs every query: {q.shape[1]=} but {k.shape[1]=}.")
        return jnp.asarray(_dense_mosaic(q, k, v, layout, interpret))
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if implementation == "blockwise":
        return _backend("blockwise").dense_attention(q, k, v)
    return _backend("reference").attention(q, k, v, None, layout, None)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dense_mosaic(q: Array, k: Array, v: Array, layout: Layout, interpret: bool) -> Array:
    half_window = jnp.full(q.shape[2], FULL, jnp.int32)
    return _backend("mosaic").arrow_attention(q, k, v, half_window, layout, None, None, None, interpret=interpret)


def _dense_forward(q: Array, k: Array, v: Array, layout: Layout, interpret: bool) -> tuple[Array, Any]:
    """Where it is differentiated, all of it is another implementation's."""
    implementation = "blockwise" if interpret else "cudnn"
    return jax.vjp(partial(arrow_attention, layout=layout, implementation=implementation), q, k, v)


_dense_mosaic.defvjp(_dense_forward, lambda layout, interpret, pull_back, cotangent: pull_back(cotangent))


def nested_arrow_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    half_windows: Int[Array, " W"],
    *,
    layout: Layout,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "W+1 B T N H"]:
    """Every head's output under each of a list of windows, and dense: what calibration compares (section 3.3).

    Args:
        q, k, v, layout, implementation, interpret: as in `arrow_attention`.
        half_windows: visual tokens kept on each side of the diagonal, increasing, not negative. It is data. On a GPU
            one pass gives all outputs, or, with the "triton" kernels, dense attention and a pass for each window,
            where `cost` expects that to be faster (in float32, and for one window or two at FLUX's 2048 px).

    Returns:
        One output per window, then the dense one.

    Raises:
        ValueError: arguments that contradict each other; the message shows both values. Windows that do not increase
            are seen outside of `jax.jit` alone.
        NotImplementedError: the named implementation cannot do this, or it is differentiated.
    """
    check_tokens(q, k, v, layout)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"Arrows need every query: {q.shape[1]=} but {k.shape[1]=}.")
    check_int32("half_windows", half_windows, (np.size(half_windows),))
    values = concrete(half_windows)
    if values is not None and (np.any(values < 0) or np.any(np.diff(values) <= 0)):
        raise ValueError(f"half_windows must be increasing and not negative, got {values.tolist()}.")
    choice = arrow_implementation(q.dtype, q.shape[-1])
    apart = (
        implementation is None and choice.implementation == "triton" and _apart(q, values, half_windows.size, layout)
    )
    implementation = _supported(implementation or choice.implementation, q, True, interpret)
    if implementation == "jax_triton":
        raise NotImplementedError(f"{implementation=} has no nested kernel; pass None or 'triton'.")

    q, k, v = _constants((q, k, v))
    half_windows = jnp.minimum(half_windows, EVERYTHING)
    if apart:
        windows = [jnp.broadcast_to(window, q.shape[2]) for window in half_windows]
        return jnp.stack([arrow_attention(q, k, v, window, layout=layout) for window in (*windows, None)])
    if implementation == "triton":
        nested, tiles = _backend("triton_nested"), tiles_for(gpu_kind(), q.shape[-1], q.dtype)
        return nested.nested_arrow_attention(q, k, v, half_windows, layout, tiles, interpret=interpret)
    if implementation == "mosaic":
        nested = _backend("mosaic_nested")
        return nested.nested_arrow_attention(q, k, v, half_windows, layout, interpret=interpret)
    return _backend(implementation).nested_arrow_attention(q, k, v, half_windows, layout)


def _backend(name: str) -> ModuleType:
    """Imported when it is used: each works where another is missing, or needs another version of JAX."""
    kernel = {
        "triton": "triton.arrow",
        "triton_nested": "triton.nested",
        "mosaic": "mosaic.arrow",
        "mosaic_nested": "mosaic.nested",
    }
    return import_module(f"pallas_kernels.backends.{kernel.get(name, name)}")


def _apart(q: Array, half_windows: np.ndarray | None, count: int, layout: Layout) -> bool:
    """Whether a pass for each window is faster than one for all. Unknown windows are taken as V/16, V/32 and so on."""
    if q.dtype == jnp.float32:
        return True  # the nested kernel spills 432 bytes a thread at a head_dim of 64
    batch, _, heads, dim = q.shape
    windows = layout.num_visual // 2 ** np.arange(4, 4 + count) if half_windows is None else half_windows
    args = row_for(gpu_kind()).lower(), dim, layout, windows, heads, batch
    return cost.separate_seconds(*args) < cost.nested_seconds(*args)


class Choice(NamedTuple):
    """An implementation, and why it was chosen."""

    implementation: str
    why: str


def gpu_kind() -> str | None:
    """Name of the NVIDIA GPU that programs are for: that of the mesh that is set, else the default device; or None."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if abstract is None else abstract.device_kind
    return kind if "NVIDIA" in kind else None


def dense_implementation(dtype: DTypeLike, head_dim: int) -> Choice:
    """What dense attention runs on."""
    if lacks := cudnn_lacks(dtype, head_dim):
        return Choice("blockwise", lacks)
    is_hopper = row_for(gpu_kind()) == "H200"
    if head_dim == 64 and is_hopper and jax.device_count() == 1 and mosaic_lacks(dtype, head_dim) is None:
        # on several GPUs a jit of sharded arrays would gather them for a kernel that XLA cannot split
        return Choice("mosaic", "for one Hopper GPU: 1.17 to 1.21 times as fast as cuDNN, which computes gradients")
    return Choice("cudnn", "cuDNN's fused attention, for 16-bit inputs on NVIDIA GPUs; it has gradients")


def cudnn_lacks(dtype: DTypeLike, head_dim: int) -> str | None:
    """Why "cudnn" cannot serve this, if so."""
    if gpu_kind() is None:
        return f"the default device is {jax.devices()[0].device_kind!r}, not an NVIDIA GPU"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's fused attention is 16-bit, not {jnp.dtype(dtype).name}"
    if head_dim > 128 or head_dim % 8:
        return f"cuDNN's fused attention needs a head_dim of at most 128, by 8s, not {head_dim}"
    return None


def arrow_implementation(dtype: DTypeLike, head_dim: int) -> Choice:
    """What arrow attention runs on."""
    kind = gpu_kind()
    if kind is None:
        return Choice("blockwise", f"the default device is {jax.devices()[0].device_kind!r}, not an NVIDIA GPU")
    is_hopper = row_for(kind) == "H200"
    lacks = mosaic_lacks(dtype, head_dim)
    if is_hopper and lacks is None:
        return Choice("mosaic", f"for Hopper: {MEASURED[head_dim]} (benchmarks/results/attention_h100.json)")
    if why := triton_lacks(dtype, head_dim):
        return Choice("blockwise", why)
    return Choice("triton", "one launch for full, arrow and cached heads" + (f"; {lacks}" if is_hopper else ""))


MEASURED = {
    64: "1.01 to 1.26 times as fast as 'triton' for full, narrow and mixed heads",
    128: "1.40 to 1.57 times as fast as 'triton' for full, narrow and mixed heads",
}
"""Of the "mosaic" kernels, by head_dim, on an H100."""


def triton_lacks(dtype: DTypeLike, head_dim: int) -> str | None:
    """Why the "triton" kernels cannot serve this, if so."""
    if head_dim not in (64, 128):
        return f"the Triton kernels are built for a head_dim of 64 and 128, not {head_dim}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the Triton kernels take bfloat16, float16 and float32, not {jnp.dtype(dtype).name}"
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is not None and float(capability) < 8:
        return f"the Triton kernels need compute capability 8.0 or above, not {capability}"
    return None


def mosaic_lacks(dtype: DTypeLike, head_dim: int) -> str | None:
    """Why the "mosaic" kernel cannot serve this, if so."""
    if jax.__version_info__ < (0, 11):
        return f"the Mosaic kernel needs jax 0.11 or newer (Python 3.12), this is {jax.__version__}"
    if head_dim not in (64, 128):
        return f"the Mosaic kernel is built for a head_dim of 64 and 128, not {head_dim}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"the Mosaic kernel takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is not None and int(float(capability)) != 9:
        return f"the Mosaic kernel is for compute capability 9 (Hopper), not {capability}"
    return None


def jax_triton_lacks(dtype: DTypeLike, head_dim: int) -> str | None:
    """Why the "jax_triton" kernel cannot serve this, if so."""
    found = {name: _version(name) for name in JAX_TRITON}
    if any(found[name].split(".")[:2] != tested.split(".")[:2] for name, tested in JAX_TRITON.items()):
        wanted = " ".join(f"{name}=={tested}" for name, tested in JAX_TRITON.items())
        return f"the jax-triton kernel needs `pip install {wanted}` (and a jax for CUDA), found {found}"
    return triton_lacks(dtype, head_dim)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


def _supported(implementation: str, q: Array, is_arrow: bool, interpret: bool) -> str:
    """The name, if it can do this."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}.")
    if interpret and implementation not in KERNELS:
        raise ValueError(f"{interpret=} is for the kernels, implementation= one of {KERNELS}, not {implementation!r}.")
    if implementation == "cudnn" and is_arrow:
        raise NotImplementedError("implementation='cudnn' computes dense attention only; pass None for arrows.")
    if implementation == "cudnn" and (why := cudnn_lacks(q.dtype, q.shape[-1])):
        raise NotImplementedError(f"{why}; pass implementation='blockwise'.")
    if implementation in KERNELS:
        if not is_arrow and implementation != "mosaic":
            raise NotImplementedError(
                f"{implementation=} computes arrows; for dense attention pass None, or half windows of FULL."
            )
        lacks = {"triton": triton_lacks, "mosaic": mosaic_lacks, "jax_triton": jax_triton_lacks}
        if why := lacks[implementation](q.dtype, q.shape[-1]):
            raise NotImplementedError(f"{why}; pass implementation='blockwise'.")
        if not interpret and gpu_kind() is None:
            raise NotImplementedError(
                f"{implementation=} runs on NVIDIA GPUs, the default device is "
                f"{jax.devices()[0].device_kind!r}; pass implementation='blockwise', or interpret=True in a test."
            )
    return implementation


@jax.custom_jvp
def _constants(arrays: Any) -> Any:
    """The arrays, whose differentiation says that there is none. Of inputs: around the call it would hide the kernel's
    mutable output from JAX, which then cannot lower it."""
    return arrays


@_constants.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "Arrow attention has no gradient: it serves inference. Use half_window=None for what is differentiated."
    )
