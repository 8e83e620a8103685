"""Arrow attention: every implementation against a float64 oracle, the kernels' cuts, and each without the others."""

import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    DRAWN,
    IMPLEMENTATIONS,
    NESTED,
    assert_as_good_as_xla,
    assert_close,
    attention,
    calls,
    draw,
    dtype_for,
    kept_pairs,
    layouts,
    options_for,
    use_tiles,
    windows,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowering import triton_kernels

from pallas_kernels import CACHED, FULL, Layout, Problem, arrow_attention, mask, nested_arrow_attention
from pallas_kernels.backends.triton.backend import Triton
from pallas_kernels.backends.triton.tiles import TABLE, Tiles
from pallas_kernels.inspect import hlo

PER_FUNCTION = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True)
def few_sizes(request, monkeypatch):
    """Blockwise by tiles, at any length. It compiles a body for each of nine sizes of block: all once, or three."""
    monkeypatch.setattr("pallas_kernels.backends.blockwise.SHORT", 0)
    if "all_sizes" not in request.fixturenames:
        monkeypatch.setattr("pallas_kernels.backends.blockwise.BAND_KEYS", (160, 384, 1536))


@pytest.fixture
def all_sizes():
    pass


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=PER_FUNCTION)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_arrows_equal_the_oracle(implementation, data, seed):
    check_arrows(implementation, data.draw(calls(**DRAWN[implementation])), seed)


MORE_PARTS_THAN_TILES = Layout(1, 64, text_first=False), [FULL], Tiles(16, 64, 4, 2, 64)
BAND = Layout(40, 230, text_first=True), [70, 33, CACHED], Tiles(32, 32, 4, 2)
LARGEST = 2**31 - 1
BEYOND = Layout(40, 230, text_first=False), [LARGEST, CACHED, 7], Tiles(32, 32, 4, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("layout", "half_window", "tiles"), [MORE_PARTS_THAN_TILES, BAND, BEYOND], ids=["parts", "band", "beyond"]
)
def test_examples_equal_the_oracle(implementation, layout, half_window, tiles):
    shape = 1, layout.length, len(half_window), 64
    check_arrows(implementation, (layout, np.array(half_window, np.int32), shape, dtype_for(implementation), tiles), 0)


@pytest.mark.parametrize(
    ("layout", "dtype"), [(Layout(7, 2371, True), jnp.float32), (Layout(19, 1976, False), jnp.float16)]
)
def test_blockwise_bands_of_many_blocks_equal_the_oracle(layout, dtype, all_sizes):
    """More keys than its largest block holds, and more visual tokens than `LONG`: rows are cut another way there."""
    windows = np.array([2283, 768, CACHED, 100, FULL], np.int32)
    check_arrows("blockwise", (layout, windows, (1, layout.length, 5, 64), dtype, None), 0)


CORNERS = {"blockwise": 800, "triton": 400, "mosaic": 320, "jax_triton": 200}
"""Tokens of a case of every kind of head in a batch of three."""


@pytest.mark.parametrize(("dim", "dtype"), [(64, jnp.float32), (64, jnp.float16), (128, jnp.bfloat16)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_dtype_and_head_dim_with_every_kind_of_head(implementation, dim, dtype):
    if implementation == "mosaic" and dtype == jnp.float32:
        pytest.skip("it is for 16 bits")
    length = CORNERS[implementation]
    layout = Layout(77, length - 77, text_first=dim == 64)
    windows = np.array([FULL, CACHED, 0, length // 9, 3 * length], np.int32)
    check_arrows(implementation, (layout, windows, (3, length, 5, dim), dtype, Tiles(64, 32, 4, 2, 128)), 1)


def check_arrows(implementation, call, seed):
    layout, half_window, shape, dtype, tiles = call
    q, k, v, cache = (draw(shape, seed + i, dtype) for i in range(4))
    computed, cached = half_window != CACHED, half_window == CACHED
    cache = np.where(cached[:, None], cache, np.nan).astype(dtype)  # the rest may not show, nor stay unwritten
    order = jnp.asarray(np.random.default_rng(seed).permutation(shape[2]), jnp.int32)
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, tiles)
        call = partial(arrow_attention, layout=layout, **options_for(implementation))
        out = np.asarray(jax.jit(call)(q, k, v, jnp.asarray(half_window), cache=cache, head_order=order))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[:, :, cached], cache[:, :, cached])
    kept = kept_pairs(half_window, layout)[computed]
    if computed.any():
        assert_as_good_as_xla(*(np.asarray(x)[:, :, computed] for x in (out, q, k, v)), kept)


FILES = {
    "reference": ("reference",),
    "blockwise": ("blockwise",),
    "triton": ("triton.backend", "triton.arrow", "triton.nested", "triton.softmax"),  # not the tiles, which are data
    "mosaic": ("mosaic.backend", "mosaic.arrow", "mosaic.nested", "mosaic.block", "mosaic.jobs"),
    "jax_triton": ("jax_triton.backend", "jax_triton.arrow"),
}


@pytest.mark.parametrize("removed", FILES)
def test_any_backend_can_be_removed_and_the_rest_works(removed):
    """In a process of its own, where importing the backend's files fails."""
    missing = {"mosaic"} if jax.__version_info__ < (0, 11) else set()
    missing |= {"jax_triton"} if find_spec("jax_triton") is None else set()
    kept = sorted(FILES.keys() - missing - {removed})
    default = [None] if removed != "blockwise" else []
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[f"pallas_kernels.backends.{name}" for name in FILES[removed]]}))
import jax, jax.numpy as jnp
from pallas_kernels import Layout, arrow_attention
from pallas_kernels.backends.registry import interpretable_names
q = jnp.ones((1, 48, 2, 64), jnp.bfloat16)
def attend(name):
    options = dict(implementation=name, interpret=name in interpretable_names(), layout=Layout(16, 32, False))
    return jax.eval_shape(lambda q: arrow_attention(q, q, q, jnp.array([-1, 3], jnp.int32), **options), q)
for name in {kept + default}:
    assert attend(name).shape == q.shape, name
try:
    attend({removed!r})
except (ImportError, NotImplementedError) as error:
    print("removed:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "removed:" in done.stdout


@pytest.mark.parametrize("implementation", NESTED)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=PER_FUNCTION)
@given(data=st.data())
def test_nested_outputs_equal_their_own_calls(implementation, data):
    layout, _, (batch, length, _, dim), dtype, tiles = data.draw(calls(**DRAWN[implementation]))
    ladder = data.draw(st.lists(windows(layout.num_visual, 0), min_size=1, max_size=4, unique=True).map(sorted))
    check_nested(implementation, layout, ladder, (batch, length, 1, dim), dtype, tiles)


@pytest.mark.parametrize("implementation", ["reference", *NESTED])
@pytest.mark.parametrize("ladder", [[0, 1, 5, LARGEST], [63, 64, 127, 128, 200]], ids=["narrow", "edges of tiles"])
def test_rings_that_share_tiles(implementation, ladder):
    layout = Layout(40, 430, text_first=False)
    check_nested(implementation, layout, ladder, (1, layout.length, 1, 64), dtype_for(implementation), None)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", NESTED)
def test_nested_outputs_in_16_bits(implementation, dtype):
    layout = Layout(77, CORNERS[implementation] - 177, text_first=True)
    check_nested(implementation, layout, [3, 60, 200], (2, layout.length, 1, 128), dtype, None)


def check_nested(implementation, layout, ladder, shape, dtype, tiles):
    q, k, v = (draw(shape, seed, dtype) for seed in range(3))
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, tiles or Tiles(32, 32, 4, 2))
        call = partial(nested_arrow_attention, layout=layout, **options_for(implementation))
        outs = np.asarray(jax.jit(call)(q, k, v, jnp.array(ladder, jnp.int32)))
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
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_that_no_tile_visits_are_never_read(implementation, text_first, monkeypatch):
    """Cost follows the window: NaN out of its reach shows nowhere."""
    layout, window = Layout(40, 1000, text_first), 30
    use_tiles(monkeypatch, Tiles(32, 32, 4, 2))
    monkeypatch.setattr("pallas_kernels.backends.blockwise.BAND_ROWS", 32)
    q, k, v = (draw((1, 1040, 1, 64), seed, dtype_for(implementation)) for seed in range(3))
    visual = layout.visual.start
    poisoned = np.zeros(1040, bool)
    poisoned[visual + 130 : visual + 200] = True  # further left, Mosaic's ragged tile of text holds them, with weight 0
    poisoned[visual + 900 : visual + 1000] = True
    k, v = (jnp.where(poisoned[:, None, None], jnp.nan, x) for x in (k, v))
    call = partial(arrow_attention, layout=layout, **options_for(implementation))
    out = jax.jit(call)(q, k, v, jnp.array([window], jnp.int32))
    clear = slice(visual + 400, visual + 600)
    kept = kept_pairs([window], layout)
    want = attention(q, *(jnp.where(poisoned[:, None, None], 0, x) for x in (k, v)), kept & ~poisoned)
    assert_close(out[:, clear], want[:, clear], atol=2e-6 if q.dtype == jnp.float32 else 4e-3)
    assert np.isnan(out[:, layout.text]).all(), "text queries see every key"


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=PER_FUNCTION)
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


def official_density(half_window, layout, rows, keys):
    """The visited fraction of tiles in the authors' CUDA kernel, which cuts tiles from the first token on.

    A tile that holds a text token is visited, and nothing is masked within tiles: the figures of the paper count these.
    The kernel's own tiles are 128x128 (head_dim 64) and 128x64 (128).
    """
    length, text = layout.length, layout.text
    first_row = np.arange(0, length, rows)[:, None]
    first_key = np.arange(0, length, keys)[None, :]
    last_row, last_key = (np.minimum(first + size, length) for first, size in ((first_row, rows), (first_key, keys)))
    has_text = [
        (first < text.stop) & (last > text.start) for first, last in ((first_row, last_row), (first_key, last_key))
    ]
    w = np.where(half_window < 0, length, half_window)[:, None, None]
    near = (first_key < first_row + rows + w) & (last_key > first_row - w)
    return np.where(half_window == CACHED, 0, (near | has_text[0] | has_text[1]).mean((1, 2)))


@pytest.mark.parametrize(
    ("layout", "keys", "sparsity"),
    [
        (Layout(333, 4096, False), 128, (0.710, 0.759, 0.759)),
        (Layout(512, 4096, True), 64, (0.671, 0.718, 0.742)),
        (Layout(512, 16384, True), 64, (0.820, 0.875, 0.904)),
    ],
)
def test_official_density_at_the_sizes_of_the_paper(layout, keys, sparsity):
    """V/8, V/16 and V/32; the figures are of an emulation of the authors' kernel."""
    windows = np.array([layout.num_visual // (2 * f) for f in (8, 16, 32)], np.int32)
    np.testing.assert_allclose(1 - official_density(windows, layout, 128, keys), sparsity, atol=5e-4)


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
        np.testing.assert_allclose(official_density(half_window, layout, 128, 64), want)


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
    backend = Triton(tiles)

    def arrow(q, k, v, half_window, cache):
        problem = Problem(operation="arrow", q=q, k=k, v=v, layout=layout, half_window=half_window, cache=cache)
        return backend.arrow(problem, interpret=False)

    def nested(q, k, v, half_windows):
        return backend.nested(Problem(operation="nested", q=q, k=k, v=v, layout=layout), half_windows, interpret=False)

    kernels = triton_kernels(arrow, x, x, x, window, x) | triton_kernels(nested, x, x, x, window)
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
