"""Arrow attention: every implementation against a float64 oracle, the kernels' cuts, transformations, refusals."""

import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lowering import triton_kernels

from pallas_kernels import (
    CACHED,
    FULL,
    Layout,
    arrow,
    arrow_attention,
    hlo,
    mask,
    nested_arrow_attention,
    triton,
    triton_nested,
)
from pallas_kernels.tiles import TABLE, Tiles

IMPLEMENTATIONS = ("blockwise", "triton")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def draw(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def kept_pairs(half_window, layout):
    """The token rule [N, T, S]; a cached head keeps nothing. (In NumPy: `dense_mask` would compile for every shape.)"""
    position = np.arange(layout.length)
    text = (position >= layout.text.start) & (position < layout.text.stop)
    window = np.asarray(half_window)[:, None, None]
    near = np.abs(position[:, None] - position) <= window
    return (near | text[:, None] | text | (window == FULL)) & (window != CACHED)


def attention(q, k, v, kept, dtype):
    """Over the pairs in `kept` [N, T, S]: in float64 the oracle, in another dtype what plain XLA makes of it."""
    where = np.where(kept[None], 0.0, -np.inf)
    if dtype == np.float64:
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        scores = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5 + where
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5 + jnp.asarray(where, dtype)
    return np.asarray(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v), np.float64)


def assert_as_good_as_xla(out, q, k, v, kept):
    """At most twice the error of the same computation in plain XLA, and 4 units in the last place."""
    want = attention(q, k, v, kept, np.float64)
    of_xla = np.abs(attention(q, k, v, kept, q.dtype) - want).max()
    rounding = 4 * float(jnp.finfo(q.dtype).eps) * float(jnp.abs(v).max())
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


MORE_PARTS_THAN_TILES = (
    Layout(1, 64, text_first=False), np.array([FULL], np.int32), (1, 65, 1, 64), jnp.float32, Tiles(16, 64, 4, 2, 64)
)  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(call=calls(), seed=st.integers(0, 2**31))
@example(call=MORE_PARTS_THAN_TILES, seed=0)
def test_arrows_equal_the_oracle(implementation, call, seed):
    check_arrows(implementation, call, seed)


NEEDS_MOSAIC = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU's interpret mode needs jax 0.11")
CHEAP = {"longest": 500, "batches": 2, "dtypes": DTYPES[1:]}
"""For Mosaic's interpret mode, which takes seconds a call; it is 16-bit."""


@NEEDS_MOSAIC
@settings(max_examples=6, deadline=None, derandomize=True)
@given(call=calls(**CHEAP), seed=st.integers(0, 2**31))
def test_mosaic_arrows_equal_the_oracle(call, seed):
    check_arrows("mosaic", call, seed)


NEEDS_JAX_TRITON = pytest.mark.skipif(find_spec("jax_triton") is None, reason="jax-triton is not installed")
BAND = Layout(40, 230, True), np.array([70, 33, CACHED], np.int32), (2, 270, 3, 64), jnp.float32, Tiles(32, 32, 4, 2)


@NEEDS_JAX_TRITON
@settings(max_examples=6, deadline=None, derandomize=True)
@given(call=calls(longest=300, batches=1, sizes=(32, 64)), seed=st.integers(0, 2**31))
@example(call=BAND, seed=0)
def test_jax_triton_arrows_equal_the_oracle(call, seed):
    """Triton's interpreter takes 3 ms for a tile of any size."""
    check_arrows("jax_triton", call, seed)


def check_arrows(implementation, call, seed):
    layout, half_window, shape, dtype, tiles = call
    q, k, v, cache = (draw(shape, seed + i, dtype) for i in range(4))
    computed, cached = half_window != CACHED, half_window == CACHED
    cache = jnp.where(cached[:, None], cache, jnp.nan)  # nothing of it may show, and nothing may be left unwritten
    order = jnp.asarray(np.random.default_rng(seed).permutation(shape[2]), jnp.int32)
    call = partial(arrow_attention, layout=layout, implementation=implementation)
    call = partial(call, interpret=implementation in arrow.KERNELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow, "tiles_for", lambda *_: tiles)
        out = jax.jit(call)(q, k, v, jnp.asarray(half_window), cache=cache, head_order=order)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[:, :, cached], cache[:, :, cached])
    kept = kept_pairs(half_window, layout)[computed]
    if computed.any():
        assert_as_good_as_xla(*(x[:, :, computed] for x in (out, q, k, v)), kept)


BACKENDS = {
    "reference": ("reference",),
    "blockwise": ("blockwise",),
    "triton": ("triton", "triton_nested", "triton_common"),
    "mosaic": ("mosaic", "mosaic_nested", "mosaic_common"),
    "jax_triton": ("jax_triton",),
}
MISSING = {"mosaic"} if jax.__version_info__ < (0, 11) else set()
MISSING |= {"jax_triton"} if find_spec("jax_triton") is None else set()


@pytest.mark.parametrize("removed", BACKENDS)
def test_any_backend_can_be_removed_and_the_rest_works(removed):
    """In a process of its own, where importing the backend's files fails."""
    kept = sorted(BACKENDS.keys() - MISSING - {removed})
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[f"pallas_kernels.{name}" for name in BACKENDS[removed]]}))
import jax, jax.numpy as jnp
from pallas_kernels import Layout, arrow, arrow_attention
q = jnp.ones((1, 48, 2, 64), jnp.bfloat16)
def attend(name):
    options = dict(implementation=name, interpret=name in arrow.KERNELS, layout=Layout(16, 32, False))
    return jax.eval_shape(lambda q: arrow_attention(q, q, q, jnp.array([-1, 3], jnp.int32), **options), q)
for name in {kept}:
    assert attend(name).shape == q.shape, name
try:
    attend({removed!r})
except (ImportError, NotImplementedError) as error:
    print("removed:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "removed:" in done.stdout


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_nested_outputs_equal_their_own_calls(implementation, data):
    check_nested(implementation, data, calls())


@NEEDS_MOSAIC
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_mosaic_nested_outputs_equal_their_own_calls(data):
    check_nested("mosaic", data, calls(**CHEAP))


def check_nested(implementation, data, cases):
    layout, _, (batch, length, _, dim), dtype, tiles = data.draw(cases)
    ladder = data.draw(st.lists(windows(layout.num_visual, 0), min_size=1, max_size=4, unique=True).map(sorted))
    q, k, v = (draw((batch, length, 1, dim), seed, dtype) for seed in range(3))
    options = {"layout": layout, "implementation": implementation, "interpret": implementation in arrow.KERNELS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow, "tiles_for", lambda *_: tiles)
        outs = jax.jit(partial(nested_arrow_attention, **options))(q, k, v, jnp.array(ladder, jnp.int32))
    assert outs.shape == (len(ladder) + 1, *q.shape)
    assert outs.dtype == dtype
    for window, out in zip([*ladder, FULL], outs, strict=True):
        kept = kept_pairs([window], layout)
        assert_as_good_as_xla(out, q, k, v, kept)


def test_blockwise_computes_nothing_for_cached_heads():
    """XLA moves what is constant over a loop in front of it: the loop over heads must hold one loop, and no product."""
    layout, q = Layout(64, 1024, False), jax.ShapeDtypeStruct((1, 1088, 4, 64), jnp.float32)
    call = jax.jit(partial(arrow_attention, layout=layout, implementation="blockwise"), donate_argnames="cache")
    module = hlo._Module(call.lower(q, q, q, jax.ShapeDtypeStruct((4,), jnp.int32), cache=q).compile().as_text())
    (heads,) = (i for i in module.computations[module.entry] if i.opcode == "while")
    inside = [i.opcode for i in module.computations[heads.attribute(r"body=%([\w.\-]+)")]]
    assert inside.count("while") == 1 and not {"dot", "custom-call"} & set(inside)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(
    "implementation",
    [
        *IMPLEMENTATIONS,
        pytest.param("mosaic", marks=NEEDS_MOSAIC),
        pytest.param("jax_triton", marks=NEEDS_JAX_TRITON),
    ],
)
def test_keys_that_no_tile_visits_are_never_read(implementation, text_first, monkeypatch):
    """Cost follows the window: NaN out of its reach shows nowhere."""
    layout, window = Layout(40, 1000, text_first), 30
    monkeypatch.setattr(arrow, "tiles_for", lambda *_: Tiles(32, 32, 4, 2))
    monkeypatch.setattr("pallas_kernels.blockwise.BAND_ROWS", 32)
    q, k, v = (draw((1, 1040, 1, 64), seed, dtype_for(implementation)) for seed in range(3))
    visual = layout.visual.start
    poisoned = np.zeros(1040, bool)
    poisoned[visual + 130 : visual + 200] = True  # further left, Mosaic's ragged tile of text holds them, with weight 0
    poisoned[visual + 900 : visual + 1000] = True
    k, v = (jnp.where(poisoned[:, None, None], jnp.nan, x) for x in (k, v))
    call = partial(arrow_attention, layout=layout, implementation=implementation)
    call = partial(call, interpret=implementation in arrow.KERNELS)
    out = jax.jit(call)(q, k, v, jnp.array([window], jnp.int32))
    clear = slice(visual + 400, visual + 600)
    kept = kept_pairs([window], layout)
    want = attention(q, *(jnp.where(poisoned[:, None, None], 0, x) for x in (k, v)), kept & ~poisoned, np.float64)
    assert_close(out[:, clear], want[:, clear], atol=2e-6 if q.dtype == jnp.float32 else 4e-3)
    assert np.isnan(out[:, layout.text]).all(), "text queries see every key"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layout=layouts(200), rows=st.sampled_from([1, 4, 16, 32]), keys=st.sampled_from([1, 4, 16, 32]), data=st.data())
def test_tiles_are_those_that_the_mask_touches(layout, rows, keys, data):
    half_window = np.array(data.draw(st.lists(windows(layout.num_visual), min_size=1, max_size=3)), np.int32)
    kept = kept_pairs(half_window, layout)
    np.testing.assert_array_equal(mask.kept_pairs(half_window, layout), kept.sum((1, 2)))
    np.testing.assert_allclose(mask.density(half_window, layout), kept.mean((1, 2)))

    def starts(part, size):
        return [slice(i, min(i + size, part.stop)) for i in range(part.start, part.stop, size)]

    tiles = [(r, c) for a in (layout.text, layout.visual) for r in starts(a, rows)
             for b in (layout.text, layout.visual) for c in starts(b, keys)]  # fmt: skip
    counted = mask.count_tiles(half_window, layout, rows, keys)
    assert counted.total == len(tiles)
    for head, pairs in enumerate(kept):
        touched = [pairs[tile] for tile in tiles if pairs[tile].any()]
        assert counted.visited[head] == len(touched)
        need_a_mask = sum(not pairs.all() or pairs.shape[1] < keys for pairs in touched)
        assert need_a_mask <= counted.masked[head] <= counted.visited[head]


def test_tiles_inside_a_window_are_kept_as_a_whole():
    layout = Layout(0, 400, True)
    for window in (0, 1, 63, 64, 65, 200, 400):
        kept = kept_pairs([window], layout)[0]
        for first in range(0, 400, 64):
            ranges = [int(x) for x in mask.band(first, first + 63, window, 400, 32)]
            for tile in range(13):
                pairs = kept[first : first + 64, tile * 32 : tile * 32 + 32]
                assert pairs.any() == (ranges[0] <= tile < ranges[3])
                assert (pairs.all() and pairs.shape[1] == 32) or not ranges[1] <= tile < ranges[2]


def test_official_density_is_that_of_the_official_tile_rule():
    layout, half_window = Layout(70, 500, True), np.array([FULL, CACHED, 0, 40, 333], np.int32)
    for layout in (Layout(70, 500, True), Layout(70, 500, False)):
        text, want = np.zeros(570, bool), []
        text[layout.text] = True
        for window in half_window:
            visited = total = 0
            for i in range(0, 570, 128):
                for j in range(0, 570, 64):
                    last_i, last_j = min(i + 128, 570) - 1, min(j + 64, 570) - 1
                    apart = max(j - last_i, i - last_j, 0)
                    near = window == FULL or apart <= window or text[i : last_i + 1].any() or text[j : last_j + 1].any()
                    visited, total = visited + (near and window != CACHED), total + 1
            want.append(visited / total)
        np.testing.assert_allclose(mask.official_density(half_window, layout, 128, 64), want)


@pytest.mark.parametrize(
    ("num_text", "num_visual", "floor"), [(256, 1024, 0.36), (512, 4096, 0.21), (512, 16384, 0.06)]
)
def test_text_is_a_floor_of_density(num_text, num_visual, floor):
    """Text rows and columns are dense whatever the window."""
    diagonal = mask.density(np.array([0], np.int32), Layout(num_text, num_visual, True))
    assert diagonal[0] == pytest.approx(floor, abs=0.006)


def test_fused_exp2_is_exact_to_rounding():
    """`FMA_EXP2` in float32: one rounding of x * scale - shift, then 2**that with denormals flushed."""
    scores, scale = np.linspace(-200, 0, 200_001).astype(np.float32), np.float32(64**-0.5 * np.log2(np.e))
    shift = np.float32(0.37)
    fused = (scores.astype(np.float64) * np.float64(scale) - np.float64(shift)).astype(np.float32)
    weights = np.exp2(fused.astype(np.float64)).astype(np.float32)
    weights[fused < -126] = 0
    exact = np.exp2(scores.astype(np.float64) * np.float64(scale) - np.float64(shift))
    assert np.all(np.abs(weights - exact) <= exact * 2**-23 * (1 + np.abs(fused)) + 2.0**-126)


def test_a_row_whose_first_tile_is_masked_as_a_whole():
    """The weights it gives to masked keys must vanish with the first true score, whatever rounding a fused product
    does: UNSEEN times the scale is exact in float32."""
    for dim in (64, 128):
        scale = np.float32(dim**-0.5 * np.log2(np.e))
        product = np.float32(mask.UNSEEN) * scale
        assert np.float64(product) == np.float64(np.float32(mask.UNSEEN)) * np.float64(scale)
        assert np.isfinite(product)


SHIPPED = sorted({(dim, size, tiles) for (_, dim, size), tiles in TABLE.items()}, key=str)


@pytest.mark.parametrize(("dim", "size", "tiles"), SHIPPED, ids=str)
@pytest.mark.parametrize("layout", [Layout(512, 4096, True), Layout(333, 4096, False), Layout(0, 4000, True)], ids=str)
def test_kernels_lower_for_cuda(layout, dim, size, tiles):
    """Loops that Triton pipelines, and no store past the end of a ragged array."""
    dtype = jnp.bfloat16 if size == 2 else jnp.float32
    x = jax.ShapeDtypeStruct((2, layout.length, 3, dim), dtype)
    window = jax.ShapeDtypeStruct((3,), jnp.int32)
    call = partial(triton.arrow_attention, layout=layout, layer=None, head_order=None, tiles=tiles, interpret=False)
    kernels = triton_kernels(call, x, x, x, window, cache=x)
    nested = partial(triton_nested.nested_arrow_attention, layout=layout, tiles=tiles, interpret=False)
    kernels |= triton_kernels(nested, x, x, x, window)
    assert set(kernels) - {"arrow_attention_merge"} == {"arrow_attention", "nested_arrow_attention"}
    for name, text in kernels.items():
        assert "scf.for" in text, name
        assert "scf.while" not in text, name
        stores = re.findall(r"tt\.store ([^:]*) : tensor<[^>]*!tt\.ptr<(\w+)>", text)
        of_output = [operands for operands, kind in stores if kind == ("bf16" if size == 2 else "f32")]
        assert of_output
        if size == 2:  # float32 stores are those of partial results, whose arrays are padded
            assert all(operands.count(",") == 2 for operands in of_output), f"{name} stores without a mask"
        assert "tf32" not in text.lower(), f"{name} multiplies in TF32"


def arguments(attend):
    dtype = dtype_for(attend.keywords["implementation"])
    q, k, v, cache = (draw((2, LAYOUT.length, 2, 64), seed, dtype) for seed in range(4))
    return q, k, v, cache


def dtype_for(implementation):
    return jnp.bfloat16 if implementation == "mosaic" else jnp.float32


def assert_close(got, want, atol):
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=atol, rtol=0)


LAYOUT = Layout(20, 100, True)
OPTIONS = [{"implementation": name, "interpret": name == "triton"} for name in ("reference", *IMPLEMENTATIONS)]
OPTIONS = [
    *(pytest.param(options, id=options["implementation"]) for options in OPTIONS),
    pytest.param({"implementation": "jax_triton", "interpret": True}, id="jax_triton", marks=NEEDS_JAX_TRITON),
    pytest.param({"implementation": "mosaic", "interpret": True}, id="mosaic", marks=NEEDS_MOSAIC),
]


@pytest.fixture(params=OPTIONS)
def attend(request, monkeypatch):
    monkeypatch.setattr(arrow, "tiles_for", lambda *_: Tiles(32, 32, 4, 2, 64))
    return partial(arrow_attention, layout=LAYOUT, **request.param)


WINDOW = jnp.array([CACHED, 7], jnp.int32)


def test_vmap(attend):
    q, k, v, cache = (jnp.stack([x, x[::-1] * 2]) for x in arguments(attend))
    windows_ = jnp.array([[CACHED, 7], [FULL, 0]], jnp.int32)
    got = jax.jit(jax.vmap(lambda q, k, v, w, c: attend(q, k, v, w, cache=c)))(q, k, v, windows_, cache)
    for i in range(2):
        assert_close(got[i], attend(q[i], k[i], v[i], windows_[i], cache=cache[i]), atol=1e-6)


def test_loops_and_branches_with_the_stack_in_the_carry(attend):
    q, k, v, _ = arguments(attend)
    stack = draw((3, *q.shape), 9, q.dtype)
    want = stack
    for layer in range(3):
        want = want.at[layer].set(attend(q * jnp.asarray(layer + 1, q.dtype), k, v, WINDOW, cache=want[layer]))

    def step(layer, stack):
        return attend(q * (layer + 1).astype(q.dtype), k, v, WINDOW, cache=stack, layer=layer)

    looped = jax.jit(lambda s: jax.lax.fori_loop(0, 3, step, s))(stack)
    scanned = jax.jit(lambda s: jax.lax.scan(lambda c, i: (step(i, c), None), s, jnp.arange(3))[0])(stack)
    branched = jax.jit(lambda s, p: jax.lax.cond(p, lambda s: step(jnp.int32(1), s), lambda s: s, s))
    assert_close(looped, want, atol=1e-6)
    assert_close(scanned, looped, atol=1e-6)
    assert_close(branched(stack, True), stack.at[1].set(looped[1]), atol=2e-6)
    np.testing.assert_array_equal(branched(stack, False), stack)
    np.testing.assert_array_equal(looped[:, :, :, 0], stack[:, :, :, 0])  # the cached head, to the bit


@pytest.mark.parametrize("over", ["heads", "batch"])
@pytest.mark.parametrize("options", OPTIONS[:-1])  # interpret mode of Mosaic keeps its state for one device at a time
def test_shard_map_needs_no_collectives(options, over):
    """In a process of its own, whose CPU counts as two devices."""
    dtype = dtype_for(options["implementation"]).dtype.name
    code = f"""
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from pallas_kernels import CACHED, Layout, arrow_attention

jax.config.update("jax_num_cpu_devices", 2)
layout, window = Layout(20, 100, True), jnp.array([CACHED, 7], jnp.int32)
q, k, v, cache = (jax.random.normal(jax.random.key(i), (2, 120, 2, 64), {dtype!r}) for i in range(4))
attend = lambda q, k, v, w, c: arrow_attention(q, k, v, w, layout=layout, cache=c, **{options})
tokens, heads = (P(None, None, "x"), P("x")) if {over!r} == "heads" else (P("x"), P())
specs = tokens, tokens, tokens, heads, tokens
mesh = Mesh(np.array(jax.devices()), ("x",))
assert mesh.size == 2
sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False))
arrays = [jax.device_put(x, jax.sharding.NamedSharding(mesh, s)) for x, s in zip((q, k, v, window, cache), specs)]
compiled = sharded.lower(*arrays).compile()
assert not re.search("all-gather|all-reduce|all-to-all|collective", compiled.as_text())
got, want = (np.asarray(x, np.float32) for x in (compiled(*arrays), jax.jit(attend)(q, k, v, window, cache)))
np.testing.assert_allclose(got, want, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_donated_cache_is_the_result(attend):
    if attend.keywords["implementation"] == "jax_triton":
        pytest.skip("interpreted, it is a callback, whose result has a buffer of its own; test_kernels_aot compiles it")
    q, k, v, cache = arguments(attend)
    compiled = jax.jit(lambda q, k, v, w, c: attend(q, k, v, w, cache=c), donate_argnums=4)
    pointer = cache.unsafe_buffer_pointer()
    assert compiled(q, k, v, WINDOW, cache).unsafe_buffer_pointer() == pointer


def test_differentiation_is_refused(attend):
    q, k, v, cache = arguments(attend)
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda q: attend(q, k, v, WINDOW, cache=cache).sum())(q)


def test_a_new_plan_compiles_nothing(attend):
    q, k, v, cache = arguments(attend)
    traced = []

    @jax.jit
    def run(window):
        traced.append(window)
        return attend(q, k, v, window, cache=cache)

    for window in ([FULL, 3], [CACHED, CACHED], [0, 1000]):
        run(jnp.array(window, jnp.int32))
    assert len(traced) == 1


def test_a_cached_head_without_a_cache_is_nan(attend):
    q, k, v, _ = arguments(attend)
    out = jax.jit(lambda w: attend(q, k, v, w))(WINDOW)
    assert np.isnan(out[:, :, 0]).all()
    assert not np.isnan(out[:, :, 1]).any()


Q = draw((1, 10, 2, 8))
ARROW = {"layout": Layout(2, 8, True), "q": Q, "k": Q, "v": Q, "half_window": jnp.zeros(2, jnp.int32)}


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": draw((1, 8, 2, 8))}, r"every query: q.shape\[1\]=8 but k.shape\[1\]=10"),
        ({"half_window": jnp.zeros(3, jnp.int32)}, r"int32 \[2\], got int32 \(3,\)"),
        ({"half_window": jnp.zeros(2, jnp.float32)}, "float32"),
        ({"half_window": jnp.array([0, -3], jnp.int32)}, "holds -3"),
        ({"half_window": jnp.array([0, -2], jnp.int32)}, r"\[0, -2\] has cached heads \(-2\), but cache is None"),
        ({"head_order": jnp.zeros(3, jnp.int32)}, r"head_order must be int32 \[2\], got int32 \(3,\)"),
        ({"head_order": jnp.zeros(2, jnp.int32)}, r"permutation of 2 heads, got \[0, 0\]"),
        ({"head_order": jnp.arange(2), "half_window": None}, "half_window, which is None"),
        ({"cache": draw((1, 9, 2, 8))}, r"\(1, 9, 2, 8\)"),
        ({"cache": Q.astype(jnp.bfloat16)}, "bfloat16"),
        ({"cache": Q[None], "layer": jnp.int32(1)}, "layer=1 is outside the cache stack of 1"),
        ({"cache": Q[None], "layer": -1}, "layer=-1"),
        ({"interpret": True, "implementation": "blockwise"}, "interpret=True"),
        ({"q": Q.astype(jnp.int32), "k": Q.astype(jnp.int32), "v": Q.astype(jnp.int32)}, "int32"),
    ],
)
def test_bad_input_is_refused_with_both_values(change, message):
    args = ARROW | change
    with pytest.raises(ValueError, match=message):
        arrow_attention(args.pop("q"), args.pop("k"), args.pop("v"), args.pop("half_window"), **args)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("half_windows", "message"),
    [
        (jnp.array([3, 3], jnp.int32), r"increasing and not negative, got \[3, 3\]"),
        (jnp.array([-1, 3], jnp.int32), r"\[-1, 3\]"),
        (jnp.array([[3]], jnp.int32), r"int32 \[1\], got int32 \(1, 1\)"),
        (jnp.array([3.0]), "float32"),
    ],
)
def test_nested_refuses_bad_windows(half_windows, message):
    with pytest.raises(ValueError, match=message):
        nested_arrow_attention(Q, Q, Q, half_windows, layout=Layout(2, 8, True))


@pytest.mark.parametrize(
    ("options", "dtype", "dim", "message"),
    [
        ({"implementation": "cudnn"}, jnp.bfloat16, 64, "dense attention only; pass None"),
        ({"implementation": "triton"}, jnp.bfloat16, 64, "NVIDIA GPUs.*'cpu'.*pass implementation='blockwise'"),
        ({"implementation": "triton"}, jnp.bfloat16, 32, "64 and 128, not 32; pass implementation='blockwise'"),
        ({"implementation": "triton", "half_window": None}, jnp.bfloat16, 64, "computes arrows; for dense"),
        ({"implementation": "mosaic"}, jnp.bfloat16, 64, "NVIDIA GPUs.*'cpu'|needs jax 0.11 or newer"),
        ({"implementation": "mosaic"}, jnp.float32, 64, "bfloat16 and float16, not float32|needs jax 0.11 or newer"),
        ({"implementation": "jax_triton"}, jnp.bfloat16, 64, "NVIDIA GPUs.*'cpu'|`pip install jax-triton==0.3.1 trit"),
        ({"implementation": "jax_triton"}, jnp.bfloat16, 32, "64 and 128, not 32|`pip install jax-triton==0.3.1 trit"),
    ],
)
def test_an_implementation_says_what_it_cannot_do(options, dtype, dim, message):
    q = draw((1, 10, 2, dim), dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        arrow_attention(q, q, q, layout=Layout(2, 8, True), **({"half_window": jnp.zeros(2, jnp.int32)} | options))


@pytest.mark.parametrize("found", [{"triton": "3.6.0"}, {"jax-triton": "0.4.1", "triton": "3.7.0"}])
def test_jax_triton_names_the_line_that_installs_it(found, monkeypatch):
    monkeypatch.setattr(arrow, "_version", lambda name: found.get(name, "none"))
    why = arrow.jax_triton_lacks(jnp.bfloat16, 64)
    assert "pip install jax-triton==0.3.1 triton==3.6.0" in why
    assert all(version in why for version in found.values())


@NEEDS_JAX_TRITON
def test_jax_triton_has_no_nested_kernel():
    q = draw((1, 10, 2, 64))
    with pytest.raises(NotImplementedError, match="no nested kernel; pass None or 'triton'"):
        nested_arrow_attention(
            q, q, q, jnp.ones(1, jnp.int32), layout=Layout(2, 8, True), implementation="jax_triton", interpret=True
        )


@pytest.mark.parametrize(
    ("gpu", "dim", "dtype", "implementation"),
    [
        ("NVIDIA H200", 64, jnp.bfloat16, "mosaic"),
        ("NVIDIA H100 80GB HBM3", 128, jnp.float16, "mosaic"),
        ("NVIDIA H200", 128, jnp.float32, "triton"),
        ("NVIDIA A100-SXM4-40GB", 128, jnp.bfloat16, "triton"),
        ("NVIDIA H200", 32, jnp.bfloat16, "blockwise"),
    ],
)
def test_the_default_on_an_nvidia_gpu(gpu, dim, dtype, implementation):
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        choice = arrow.arrow_implementation(dtype, dim)
    if implementation == "mosaic" and jax.__version_info__ < (0, 11):
        assert choice.implementation == "triton" and "jax 0.11" in choice.why
    else:
        assert choice.implementation == implementation
