"""Attention implementations against a float64 oracle, and what bad input is told."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import assert_highest_precision, largest_intermediate, lower_for_cuda

from pallas_kernels import CACHED, FULL, Layout, arrow_attention, dense_mask
from pallas_kernels.backends import blockwise


def draw(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def oracle(q, k, v, mask=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = np.where(mask[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def token_rule(half_window, layout):
    """The definition, one pair at a time."""
    text = set(range(layout.length)[layout.text])
    return np.array(
        [
            [
                [w == FULL or i in text or j in text or abs(i - j) <= w for j in range(layout.length)]
                for i in range(layout.length)
            ]
            for w in half_window
        ]
    )


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("num_text", [0, 1, 7])
def test_mask_is_the_token_rule(num_text, text_first):
    layout = Layout(num_text, 12, text_first)
    half_window = np.array([0, 1, 5, 100, FULL], np.int32)
    np.testing.assert_array_equal(dense_mask(jnp.asarray(half_window), layout), token_rule(half_window, layout))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("length", [1, 2, 50, 67])
@pytest.mark.parametrize("small", [False, True], ids=["one block", "ragged blocks"])
@pytest.mark.parametrize("attend", [blockwise.tiled_attention, blockwise.chunked_attention, None])
def test_dense_attention(attend, small, length, dtype, monkeypatch):
    batch, heads = 2, 3
    if small:
        monkeypatch.setattr(blockwise, "SCORE_BYTES", 4 * batch * heads * length * 7)
        monkeypatch.setattr(blockwise, "TILE_ROWS", 16)
        monkeypatch.setattr(blockwise, "TILE_KEYS", 24)
    q, k, v = (draw((batch, length, heads, 16), seed, dtype) for seed in range(3))
    if attend is None:
        out = arrow_attention(q, k, v, layout=Layout(0, length, True), implementation="reference")
    else:
        out = jax.jit(partial(attend, Layout(0, length, True)))(q, k, v)
    assert out.dtype == dtype
    tolerance = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2, jnp.float16: 2e-3}[dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), oracle(q, k, v), atol=tolerance)


def test_exp2_is_exact_to_rounding():
    x = np.linspace(-200, 0, 200_001).astype(np.float32)
    exact = np.exp2(np.maximum(x, -126).astype(np.float64))
    np.testing.assert_allclose(np.asarray(jax.jit(blockwise.exp2)(x), np.float64), exact, rtol=2e-7)


def test_dense_attention_of_some_rows():
    q, k, v = draw((1, 40, 2, 16)), draw((1, 50, 2, 16), 1), draw((1, 50, 2, 16), 2)
    out = arrow_attention(q, k, v, layout=Layout(10, 40, False))
    np.testing.assert_allclose(out, oracle(q, k, v), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_attention_has_gradients(dtype):
    layout = Layout(10, 40, True)
    q, k, v = (draw((2, 50, 2, 16), seed, dtype) for seed in range(3))

    def gradients(implementation):
        attend = partial(arrow_attention, layout=layout, implementation=implementation)
        return jax.grad(lambda *x: jnp.square(attend(*x).astype(jnp.float32)).sum(), argnums=(0, 1, 2))(q, k, v)

    for got, want in zip(gradients("blockwise"), gradients("reference"), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.linalg.norm(got - want) < (1e-5 if dtype == jnp.float32 else 2e-2) * np.linalg.norm(want)
    tangents = (
        jax.jvp(partial(arrow_attention, layout=layout, implementation=name), (q, k, v), (k, v, q))[1]
        for name in ("blockwise", "reference")
    )
    got, want = (np.asarray(tangent, np.float64) for tangent in tangents)
    assert np.linalg.norm(got - want) < (1e-5 if dtype == jnp.float32 else 2e-2) * np.linalg.norm(want)


def test_products_are_ieee_float32_and_chunked_on_a_gpu():
    q = draw((1, 40, 2, 16))
    layout, windows = Layout(8, 32, True), jnp.array([3, CACHED], jnp.int32)
    arrows = partial(arrow_attention, layout=layout, implementation="blockwise")
    dense = partial(blockwise.dense_attention, layout)
    for lowered in (lower_for_cuda(dense, q, q, q), lower_for_cuda(arrows, q, q, q, windows)):
        assert_highest_precision(lowered)
        assert "while" not in lowered.as_text(), "tiles are for CPUs"


def test_large_scores_do_not_overflow():
    q, k, v = (draw((1, 40, 2, 16), seed) * 60 for seed in range(3))
    for attend in (blockwise.tiled_attention, blockwise.chunked_attention):
        np.testing.assert_allclose(attend(Layout(0, 40, True), q, k, v), oracle(q, k, v), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("attend", [blockwise.tiled_attention, blockwise.chunked_attention])
def test_dense_attention_never_holds_all_scores(attend):
    """At 65,536 tokens they would be 17 GB. (XLA's own account of CPU memory leaves fused loops out.)"""
    x = jax.ShapeDtypeStruct((1, 65536, 1, 64), jnp.float32)
    assert largest_intermediate(partial(attend, Layout(0, 65536, True)), x, x, x) <= blockwise.SCORE_BYTES / 4


def test_arrow_heads_windows_and_cache():
    layout, half_window = Layout(5, 30, True), np.array([FULL, 0, 3, 200, CACHED], np.int32)
    q, k, v, cache = (draw((2, 35, 5, 8), seed) for seed in range(4))
    out = jax.jit(lambda w: arrow_attention(q, k, v, w, layout=layout, cache=cache))(half_window)
    want = oracle(q, k, v, token_rule(np.where(half_window == CACHED, 0, half_window), layout))
    np.testing.assert_allclose(out[:, :, :4], want[:, :, :4], atol=2e-6)
    np.testing.assert_array_equal(out[:, :, 4], cache[:, :, 4])


@pytest.mark.parametrize("rows", [35, 6], ids=["one chunk", "ragged chunks"])
@pytest.mark.parametrize("text_first", [True, False])
def test_arrows_in_chunks_of_all_heads_equal_the_rule(text_first, rows, monkeypatch):
    monkeypatch.setattr(blockwise, "SCORE_BYTES", 4 * 2 * 5 * 35 * rows)
    layout, half_window = Layout(5, 30, text_first), np.array([FULL, 0, 3, 2**31 - 1, CACHED], np.int32)
    q, k, v = (draw((2, 35, 5, 8), seed) for seed in range(3))
    stack = draw((3, 2, 35, 5, 8), 3)
    call = jax.jit(partial(blockwise.chunked_arrows, layout))
    out = call(q, k, v, half_window, stack, jnp.int32(1))
    want = oracle(q, k, v, token_rule(np.where(half_window == CACHED, 0, half_window), layout))
    np.testing.assert_allclose(out[1, :, :, :4], want[:, :, :4], atol=2e-6)
    np.testing.assert_array_equal(out, stack.at[1, :, :, :4].set(out[1, :, :, :4]))
    np.testing.assert_array_equal(call(q, k, v, half_window, stack[1], None), out[1])
    np.testing.assert_array_equal(call(q, k, v, half_window, None, None), out[1].at[:, :, 4].set(jnp.nan))


def test_cache_stack_is_updated_at_its_layer():
    layout, half_window = Layout(5, 30, False), jnp.array([CACHED, 2], jnp.int32)
    q, k, v = (draw((1, 35, 2, 8), seed) for seed in range(3))
    stack = draw((3, 1, 35, 2, 8), 9)
    updated = arrow_attention(q, k, v, half_window, layout=layout, cache=stack, layer=jnp.int32(1))
    alone = arrow_attention(q, k, v, half_window, layout=layout, cache=stack[1])
    np.testing.assert_array_equal(updated, stack.at[1].set(alone))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": draw((1, 10, 8))}, r"q must be \[B, T, N, H\]"),
        ({"k": draw((1, 10, 2, 8), dtype=jnp.bfloat16)}, "k.dtype=bfloat16"),
        ({"q": draw((1, 10, 3, 8))}, r"\(1, 10, 3, 8\)"),
        ({"layout": Layout(1, 10, True)}, "11"),
        ({"half_window": jnp.zeros(3, jnp.int32)}, r"int32 \[2\], got int32 \(3,\)"),
        ({"half_window": jnp.zeros(2, jnp.float32)}, "float32"),
        ({"q": draw((1, 8, 2, 8)), "half_window": jnp.zeros(2, jnp.int32)}, "every query"),
        ({"layer": 1}, "layer=1"),
        ({"cache": draw((1, 9, 2, 8))}, r"\(1, 9, 2, 8\)"),
        ({"cache": draw((2, 1, 10, 2, 8)), "layer": 2}, "layer=2"),
        ({"implementation": "magic"}, "'magic'"),
    ],
)
def test_bad_input_is_refused_with_both_values(change, message):
    args = {"layout": Layout(2, 8, True), "q": draw((1, 10, 2, 8)), "k": draw((1, 10, 2, 8)), "v": draw((1, 10, 2, 8))}
    args |= change
    with pytest.raises(ValueError, match=message):
        arrow_attention(args.pop("q"), args.pop("k"), args.pop("v"), args.pop("half_window", None), **args)


@pytest.mark.parametrize(("num_text", "num_visual"), [(-1, 5), (0, 0)])
def test_layout_needs_tokens(num_text, num_visual):
    with pytest.raises(ValueError, match="num_text"):
        Layout(num_text, num_visual, True)
