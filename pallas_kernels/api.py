"""`arrow_attention` and `nested_arrow_attention`: check their arguments and hand them to a backend."""

from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import jax
import jax.experimental.pallas  # noqa: F401 adds to jit's key (jax 0.12): no program's first trace may be what imports it
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.backends.base import Backend, ComputesArrows, ComputesDense, ComputesNested, Device, Problem
from pallas_kernels.backends.registry import backend_named, interpretable_names
from pallas_kernels.checks import check_cache, check_heads, check_int32, check_text_length, check_tokens, concrete
from pallas_kernels.devices import PREFERENCE, choose, passes_are_faster
from pallas_kernels.layout import Layout
from pallas_kernels.mask import EVERYTHING


@jax.enable_x64(False)
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
    text_length: Int[Array, " B"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "*L B T N H"]:
    """Attention of which each head is full, an arrow (local band, text dense) or cached (DiTFastAttnV2, section 3.1).

    Works under `jit`, `vmap`, `scan`, `cond`, and in `jax.shard_map(..., check_vma=False)` over heads or batch. JAX
    does not see through a kernel over which axes its output varies, hence `check_vma=False`.

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
        text_length: of each sample, how many text tokens there are: the rest of `layout.num_text` pads, and no query
            attends it. It is data: prompts of all lengths share a program and a plan. Outputs of padding are finite,
            and of no use. None: there is no padding. 0 is for layouts with visual tokens.
        implementation: a backend's name. None: the best for the device (`devices.PREFERENCE`): for arrows "mosaic" on
            Hopper, "triton" on other NVIDIA GPUs and "blockwise" elsewhere. "jax_triton" is a kernel in Triton itself,
            an extra: JAX will drop Pallas's Triton. "reference" is for tests.
        interpret: run a kernel on any device, slowly, for tests.

    Returns:
        The output [B, T, N, H]; with a stack, the stack with this layer's entry replaced by the output.

    Raises:
        ValueError: arguments that contradict each other; the message shows both values. Those that only data shows
            are seen outside of `jax.jit` alone: cached heads without a cache, a layer out of the stack. Inside, such a
            layer is the nearest one of the stack.
        NotImplementedError: the named implementation cannot do this, or an arrow is differentiated.
    """
    check_tokens(q, k, v, layout)
    check_heads(q, k, half_window, head_order)
    check_cache(q, half_window, cache, layer)
    check_text_length(q, layout, text_length)
    tokens: dict[str, Any] = {"q": q, "k": k, "v": v, "layout": layout, "text_length": text_length}
    entry = _entry(cache, layer)
    if half_window is None:
        out = _dense(Problem(operation="dense", **tokens), implementation, interpret)
        return out if entry is None else jax.lax.dynamic_update_index_in_dim(cache, out, entry, 0)
    windows = jnp.minimum(half_window, EVERYTHING)  # beyond, sums with positions overflow
    heads = {"half_window": windows, "cache": cache, "layer": entry, "head_order": head_order}
    return _arrow(Problem(operation="arrow", **tokens, **heads), implementation, interpret)


@jax.enable_x64(False)
def nested_arrow_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    half_windows: Int[Array, " W"],
    *,
    layout: Layout,
    text_length: Int[Array, " B"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "W+1 B T N H"]:
    """Every head's output under each of a list of windows, and dense: what calibration compares (section 3.3).

    Args:
        q, k, v, layout, text_length, implementation, interpret: as in `arrow_attention`.
        half_windows: visual tokens kept on each side of the diagonal, increasing, not negative. It is data. On a GPU
            one pass gives all outputs. The "triton" kernels take dense attention and a pass for each window where
            `cost` expects that to be faster. That is in float32, and for one window or two at FLUX's 2048 px.

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
    check_text_length(q, layout, text_length)
    problem = Problem(operation="nested", q=q, k=k, v=v, layout=layout, text_length=text_length)
    backend = _backend(problem, implementation, interpret)
    assert isinstance(backend, ComputesNested)
    in_passes = implementation is None and passes_are_faster(problem, values, half_windows.size)
    problem = _without_gradient(problem)
    half_windows = jnp.minimum(half_windows, EVERYTHING)
    return _passes(problem, half_windows) if in_passes else backend.nested(problem, half_windows, interpret=interpret)


def _entry(cache: Float[Array, "*L B T N H"] | None, layer: Int[Array, ""] | int | None) -> Int[Array, ""] | None:
    """The layer, or the nearest one of the stack."""
    if cache is None or layer is None:
        return None
    return jnp.clip(jnp.asarray(layer, jnp.int32), 0, cache.shape[0] - 1)


def _arrow(problem: Problem[Array], implementation: str | None, interpret: bool) -> Float[Array, "*L B T N H"]:
    backend = _backend(problem, implementation, interpret)
    assert isinstance(backend, ComputesArrows)
    return backend.arrow(_without_gradient(problem), interpret=interpret)


def _dense(problem: Problem[Array], implementation: str | None, interpret: bool) -> Float[Array, "B T N H"]:
    backend = _backend(problem, implementation, interpret)
    assert isinstance(backend, ComputesDense)
    return backend.dense(problem, interpret=interpret)


def _passes(problem: Problem[Array], half_windows: Int[Array, " W"]) -> Float[Array, "W+1 B T N H"]:
    """A call for each window, and a dense one."""
    q, options = problem.q, {"layout": problem.layout, "text_length": problem.text_length}
    windows = [jnp.broadcast_to(window, q.shape[2]) for window in half_windows]
    return jnp.stack([arrow_attention(q, problem.k, problem.v, window, **options) for window in (*windows, None)])


def _backend(problem: Problem[Array], implementation: str | None, interpret: bool) -> Backend:
    """The named backend, or the best for the device.

    Raises:
        ValueError: there is no backend of this name, or it has no interpret mode and is asked for it.
        NotImplementedError: the backend cannot solve the problem.
    """
    device = Device.current()
    name = implementation or choose(problem, device).implementation
    backend = backend_named(name)
    if interpret and not backend.interpretable:
        kernels = interpretable_names()
        raise ValueError(f"{interpret=} is for the kernels, implementation= one of {kernels}, not {name!r}.")
    computes, otherwise = OPERATIONS[problem.operation]
    if not isinstance(backend, computes):
        raise NotImplementedError(f"implementation={name!r} {otherwise}.")
    if why := backend.lacks(problem, replace(device, interpreted=interpret)):
        instead = f"pass implementation={PREFERENCE[problem.operation][-1]!r}"
        if backend.interpretable and not backend.lacks(problem, replace(device, interpreted=True)):
            instead += ", or interpret=True in a test"
        raise NotImplementedError(f"implementation={name!r}: {why}; {instead}.")
    return backend


OPERATIONS = {
    "arrow": (ComputesArrows, "computes dense attention only; pass None for arrows"),
    "nested": (ComputesNested, "has no nested kernel; pass None or 'triton'"),
    "dense": (ComputesDense, "computes arrows; for dense attention pass None, or half windows of FULL"),
}
"""The protocol that an operation needs, and the refusal where a backend does not satisfy it."""


def _without_gradient(problem: Problem[Array]) -> Problem[Array]:
    """The problem, whose differentiation says that there is none. It is marked at the inputs: a mark around the call
    would hide the kernel's mutable output from JAX, which then cannot lower it."""
    arrays = {name: getattr(problem, name) for name in ("q", "k", "v", "cache")}
    return replace(problem, **dict(zip(arrays, _constants(tuple(arrays.values())), strict=True)))


Arrays = TypeVar("Arrays", bound=tuple[Array | None, ...])


@jax.custom_jvp
def _constants(arrays: Arrays) -> Arrays:
    return arrays


@_constants.defjvp
def _refuse(primals: tuple[Arrays], tangents: tuple[Arrays]) -> NoReturn:
    raise NotImplementedError(
        "Arrow attention has no gradient: it serves inference. Use half_window=None for what is differentiated."
    )
