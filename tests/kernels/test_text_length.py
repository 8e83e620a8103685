"""Padding of text, in every implementation: no query attends it, and how long text is, is data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    IMPLEMENTATIONS,
    assert_close,
    attention,
    draw,
    dtype_for,
    kept_pairs,
    options_for,
    use_tiles,
)

from pallas_kernels import CACHED, FULL, Layout, arrow_attention, nested_arrow_attention
from pallas_kernels.backends import registry
from pallas_kernels.backends.base import ComputesDense, ComputesNested
from pallas_kernels.backends.triton.tiles import Tiles


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    """Blockwise by tiles, at any length, and three sizes of block, each of which is compiled."""
    monkeypatch.setattr("pallas_kernels.backends.blockwise.SHORT", 0)
    monkeypatch.setattr("pallas_kernels.backends.blockwise.BAND_KEYS", (160, 384, 1536))


LENGTHS = 150, 129, 64, 1, 0
"""Text tokens of samples padded to 150: all, a ragged tile of every kernel, whole tiles, and none."""


def assert_unpadded(out, q, k, v, kept, layout):
    """Samples of all `LENGTHS` against attention whose keys are those of the sample, at rows that are no padding."""
    for sample, length in enumerate(LENGTHS):
        of_text = np.arange(layout.length) - layout.text.start
        seen = (of_text < length) | (of_text >= layout.num_text)
        here = (np.asarray(x)[sample : sample + 1] for x in (q, k, v))
        want = attention(*here, kept & seen)
        tolerance = 2e-5 if q.dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(np.asarray(out, np.float64)[sample][seen], want[0][seen], atol=tolerance)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_padding_of_text_is_not_seen(implementation, text_first):
    """By any query, of arrows, full heads, dense calls and nested ones; and lengths are data."""
    layout, half_window = Layout(150, 170, text_first), np.array([FULL, CACHED, 0, 40], np.int32)
    dtype = dtype_for(implementation)
    q, k, v, cache = (draw((len(LENGTHS), layout.length, 4, 64), seed, dtype) for seed in range(4))
    k = k.at[:, layout.text.start + 150 - 1].set(30.0)  # what pads would show
    lengths, options = jnp.array(LENGTHS, jnp.int32), {"layout": layout} | options_for(implementation)
    computed = half_window != CACHED
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, Tiles(32, 32, 4, 2, 128))
        call = jax.jit(partial(arrow_attention, **options))
        out = call(q, k, v, jnp.asarray(half_window), cache=cache, text_length=lengths)
        np.testing.assert_array_equal(out[:, :, ~computed], cache[:, :, ~computed])
        some = [x[:, :, computed] for x in (out, q, k, v)]
        assert_unpadded(*some, kept_pairs(half_window[computed], layout), layout)
        again = call(q, k, v, jnp.asarray(half_window), cache=cache, text_length=lengths)
        np.testing.assert_array_equal(again, out)
        compiled = call._cache_size()  # of jax 0.11, whose interpret mode is another context at its second call
        every = jnp.array([150] * len(LENGTHS), jnp.int32)
        whole = call(q, k, v, jnp.asarray(half_window), cache=cache, text_length=every)
        assert call._cache_size() == compiled
        assert_close(
            whole, call(q, k, v, jnp.asarray(half_window), cache=cache), atol=1e-6 if dtype != jnp.bfloat16 else 1e-2
        )
        q, k, v = (x[:, :, :1] for x in (q, k, v))
        backend = registry.backend_named(implementation)
        if isinstance(backend, ComputesDense):
            out = jax.jit(partial(arrow_attention, **options))(q, k, v, text_length=lengths)
            assert_unpadded(out, q, k, v, kept_pairs([FULL], layout), layout)
        if isinstance(backend, ComputesNested):
            nested = jax.jit(partial(nested_arrow_attention, **options))
            outs = nested(q, k, v, jnp.array([0, 40], jnp.int32), text_length=lengths)
            for window, out in zip([0, 40, FULL], outs, strict=True):
                assert_unpadded(out, q, k, v, kept_pairs([window], layout), layout)


def test_chunks_of_all_heads_see_no_padding(monkeypatch):
    """Blockwise on accelerators, and on a CPU where sequences are short."""
    monkeypatch.setattr("pallas_kernels.backends.blockwise.SHORT", 1000)
    test_padding_of_text_is_not_seen("blockwise", text_first=True)


def test_dense_attention_of_padded_text_has_gradients():
    q, k, v = (draw((2, 40, 2, 16), seed) for seed in range(3))
    options = {"layout": Layout(10, 30, False), "text_length": jnp.array([4, 10], jnp.int32)}

    def gradients(implementation):
        attend = partial(arrow_attention, **options, implementation=implementation)
        return jax.grad(lambda *x: jnp.square(attend(*x)[:, :34]).sum(), argnums=(0, 1, 2))(q, k, v)

    for got, want in zip(gradients("blockwise"), gradients("reference"), strict=True):
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
        assert not np.asarray(want)[0, 34:].any(), "padding of the first sample has none"


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([4, 11], r"text_length must be from 0 to layout.num_text=10, got \[4, 11\]"),
        ([-1, 3], r"text_length must be from 0 to layout.num_text=10, got \[-1, 3\]"),
        ([4], r"text_length must be int32 \[2\], got int32 \(1,\)"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths, message):
    q, windows = draw((2, 40, 1, 16)), jnp.ones(1, jnp.int32)
    given = {"layout": Layout(10, 30, False), "text_length": jnp.array(lengths, jnp.int32)}
    for call in (arrow_attention, nested_arrow_attention):
        with pytest.raises(ValueError, match=message):
            call(q, q, q, windows, **given)
    with pytest.raises(ValueError, match="from 1 to"):
        arrow_attention(q, q, q, windows, layout=Layout(40, 0, True), text_length=jnp.array([0, 3], jnp.int32))
