"""Attention that tests draw, the oracle that it is compared with, and the implementations that are."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import CACHED, FULL, Layout
from pallas_kernels.backends import registry
from pallas_kernels.backends.jax_triton.backend import JaxTriton
from pallas_kernels.backends.triton.backend import Triton
from pallas_kernels.backends.triton.tiles import Tiles

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
NEEDS_MOSAIC = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU's interpret mode needs jax 0.11")
NEEDS_JAX_TRITON = pytest.mark.skipif(find_spec("jax_triton") is None, reason="jax-triton is not installed")
NESTED = ["blockwise", "triton", pytest.param("mosaic", marks=NEEDS_MOSAIC)]
IMPLEMENTATIONS = [*NESTED, pytest.param("jax_triton", marks=NEEDS_JAX_TRITON)]

DRAWN = {
    "blockwise": {},
    "triton": {},
    "mosaic": {"longest": 500, "batches": 2, "dtypes": DTYPES[1:]},
    "jax_triton": {"longest": 300, "batches": 1, "sizes": (32, 64)},
}
"""What `calls` draws for each. Mosaic's interpret mode takes seconds a call, Triton's 3 ms for a tile of any size. Left
out are the longer ones, and Mosaic has no float32."""


def options_for(implementation):
    """Kernels run in interpret mode."""
    interpret = registry.backend_named(implementation).interpretable
    return {"implementation": implementation, "interpret": interpret}


def use_tiles(patch, tiles):
    """Instead of the device's own, in the kernels whose tiles have a table."""
    patch.setitem(registry.BACKENDS, "triton", Triton(tiles))
    patch.setitem(registry.BACKENDS, "jax_triton", JaxTriton(tiles))


def dtype_for(implementation):
    return jnp.bfloat16 if implementation == "mosaic" else jnp.float32


def assert_close(got, want, atol):
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=atol, rtol=0)


def draw(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))  # a cast would compile


def kept_pairs(half_window, layout):
    """The token rule [N, T, S]; a cached head keeps nothing. (In NumPy: `dense_mask` would compile for every shape.)"""
    position = np.arange(layout.length)
    text = (position >= layout.text.start) & (position < layout.text.stop)
    window = np.asarray(half_window)[:, None, None]
    near = np.abs(position[:, None] - position) <= window
    return (near | text[:, None] | text | (window == FULL)) & (window != CACHED)


def attention(q, k, v, kept):
    """Over the pairs in `kept` [N, T, S]: the oracle, in float64."""
    where = np.where(kept[None], 0.0, -np.inf)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k, optimize=True) * q.shape[-1] ** -0.5 + where
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v, optimize=True)


@jax.jit
def plain_attention(q, k, v, kept):
    """What XLA makes of it in the arrays' own type."""
    where = jnp.where(kept[None], 0.0, -jnp.inf).astype(q.dtype)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5 + where
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


def assert_as_good_as_xla(out, q, k, v, kept):
    """At most twice the error of the same computation in plain XLA, and 4 units in the last place."""
    want = attention(q, k, v, kept)
    of_xla = np.abs(np.asarray(plain_attention(q, k, v, kept), np.float64) - want).max()
    rounding = 4 * float(jnp.finfo(q.dtype).eps) * float(np.abs(v).max())
    error = np.abs(np.asarray(out, np.float64) - want).max()
    assert error <= 2 * of_xla + rounding, f"{error=}, {of_xla=}, {rounding=}"


@st.composite
def layouts(draw_, longest=1200):
    """Lengths that are small, at the edges of tiles, or anything."""
    count = st.one_of(st.integers(0, 3), st.sampled_from([31, 32, 33, 64, 127, 128, 333]), st.integers(0, longest // 2))
    text, visual = draw_(count), draw_(count)
    return Layout(text, visual + (text + visual == 0), draw_(st.booleans()))


def windows(num_visual, least=CACHED):
    some = st.sampled_from(sorted({least, FULL, 0, 1, num_visual // 16, num_visual, 10 * num_visual + 7}))
    return st.one_of(some, st.integers(least, num_visual + 1)).filter(lambda w: w >= least)


@st.composite
def calls(draw_, longest=1200, batches=3, dtypes=DTYPES, sizes=(16, 32, 64)):
    layout = draw_(layouts(longest))
    heads = draw_(st.integers(1, 4))
    half_window = draw_(st.lists(windows(layout.num_visual), min_size=heads, max_size=heads))
    tiles = Tiles(
        rows=draw_(st.sampled_from(sizes)), keys=draw_(st.sampled_from(sizes)), warps=4, stages=2,
        text_keys=draw_(st.sampled_from([64, 200, 4096])),
    )  # fmt: skip
    shape = draw_(st.integers(1, batches)), layout.length, heads, draw_(st.sampled_from([64, 128]))
    return layout, np.array(half_window, np.int32), shape, draw_(st.sampled_from(dtypes)), tiles
