"""Arrows over time as candidates of calibration, and in the loop's attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfa2_jax.calibration.attends import Budget, Trials, TryEverything
from dfa2_jax.calibration.candidates import candidates_of
from dfa2_jax.nn.attention import LayerPlan, Planned, arrow_attention
from dfa2_jax.nn.orders import to_native, to_orders
from dfa2_jax.options import CalibrationOptions
from dfa2_jax.plan.method import Method
from pallas_kernels import CACHED, FULL, Layout

FRAMES, ROWS, COLUMNS, TEXT = 4, 2, 3, 5
LAYOUTS = [Layout(TEXT, FRAMES * ROWS * COLUMNS, text_first) for text_first in (True, False)]
ARROWS = Method.arrow(3), Method.arrow(3, "time")
LENGTH = LAYOUTS[0].length


def over_time(layout):
    """Positions of the tokens in their order over time, written out: row, column, frame."""
    grid = np.arange(FRAMES * ROWS * COLUMNS).reshape(FRAMES, ROWS, COLUMNS)
    visual = [grid[t, y, x] for y in range(ROWS) for x in range(COLUMNS) for t in range(FRAMES)]
    places = np.arange(LENGTH)
    places[layout.visual] = places[layout.visual][visual]
    return places


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["text first", "text last"])
def test_time_is_row_column_frame(layout):
    x = drawn(2, LENGTH, 3, 4)
    order = jnp.array([0, 1, 0])
    moved = to_orders(x, order, layout, FRAMES)
    np.testing.assert_array_equal(moved[:, :, 1], x[:, over_time(layout), 1])
    np.testing.assert_array_equal(moved[:, :, ::2], x[:, :, ::2])
    np.testing.assert_array_equal(to_native(moved, order, layout, FRAMES), x)


def expected(qkv, layout, window, order):
    """All heads by one method, in the native order, from permuted tokens."""
    windows = jnp.full(qkv[0].shape[2], window, jnp.int32)
    if order == "native":
        return arrow_attention(*qkv, windows, layout=layout, implementation="reference")
    places = over_time(layout)
    out = arrow_attention(*(x[:, places] for x in qkv), windows, layout=layout, implementation="reference")
    return out[:, np.argsort(places)]


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["text first", "text last"])
def test_errors_and_outputs_of_candidates_are_those_of_permuted_tokens(layout, chunk):
    qkv, before = tuple(drawn(3, 2, LENGTH, 3, 8)), drawn(1, 2, LENGTH, 3, 8) * 0.5
    candidates = (Method("cached"), *ARROWS)
    attend = TryEverything(candidates, Budget.of(30.0, None, 3), (2, 2), chunk, frames=FRAMES)
    plan = jax.tree.map(lambda x: x[0], LayerPlan.of_stack(1, 1))
    out, trials = jax.jit(lambda *x: attend(lambda: x[:3], layout, Trials.of_caches(x[3], 3), plan))(*qkv, before)
    dense, windows = expected(qkv, layout, FULL, "native"), [4, 4]
    tried = [before[0], *(expected(qkv, layout, w, m.order) for w, m in zip(windows, ARROWS, strict=True))]
    variance = jnp.var(dense, axis=(0, 1, 3))
    errors = np.stack([jnp.square(x - dense).mean((0, 1, 3)) / variance for x in tried], axis=1)
    np.testing.assert_allclose(trials.errors[0], errors, rtol=1e-4)
    assert len({*map(int, trials.picks[0])}) == 1, "reuse saves most, and all may"
    arrows_alone = TryEverything(ARROWS, Budget.of(30.0, None, 3), (2, 2), chunk, frames=FRAMES)
    out, trials = jax.jit(lambda *x: arrows_alone(lambda: x[:3], layout, Trials.of_caches(x[3], 2), plan))(*qkv, before)
    best = errors[:, 1:].argmin(1)
    np.testing.assert_array_equal(trials.picks[0], best)
    assert 0 < best.sum() < 3, "the heads differ"
    picked = jnp.stack([tried[1 + number][:, :, head] for head, number in enumerate(best)], axis=2)
    np.testing.assert_allclose(out, picked, atol=1e-5)
    np.testing.assert_allclose(trials.caches[0], picked, atol=1e-5)


def test_an_output_is_remembered_in_its_order_and_read_in_the_native_one():
    layout, qkv = LAYOUTS[0], tuple(drawn(3, 2, LENGTH, 3, 8))
    attend = Planned(skip_projections=False, frames=FRAMES)
    middle = jnp.array([0, 1, 0])
    first = LayerPlan(*map(jnp.int32, (0, 1)), jnp.array([4, 4, FULL]), None, middle, middle)
    out, memory = attend(lambda heads=None: qkv, layout, jnp.zeros((1, 2, LENGTH, 3, 8)), first)
    wanted = [expected(qkv, layout, *method) for method in ((4, "native"), (4, "time"), (FULL, "native"))]
    wanted = jnp.stack([x[:, :, head] for head, x in enumerate(wanted)], axis=2)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_allclose(memory[0, :, :, 1], wanted[:, over_time(layout), 1], atol=1e-5)
    reused = LayerPlan(*map(jnp.int32, (0, 2)), jnp.full(3, CACHED), None, jnp.zeros(3, int), middle)
    again, _ = attend(lambda heads=None: tuple(2 * x for x in qkv), layout, memory, reused)
    np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize(
    ("orders", "frames", "names"),
    [
        (None, 1, ["cached", "arrow(1/8)"]),
        (None, 3, ["cached", "arrow(1/8)", "arrow(1/8, time)"]),
        (("time",), 3, ["cached", "arrow(1/8, time)"]),
        (("time", "native"), 3, ["cached", "arrow(1/8)", "arrow(1/8, time)"]),
    ],
)
def test_videos_try_both_orders(orders, frames, names):
    options = CalibrationOptions(windows=(8,), orders=orders)
    assert [str(method) for method in candidates_of(options, frames)] == names


@pytest.mark.parametrize(("orders", "frames"), [(("time",), 1), (("space",), 3), ((), 3), (("time", "time"), 3)])
def test_orders_that_tokens_have_not_are_refused(orders, frames):
    with pytest.raises(ValueError, match="orders=.* must be different ones of"):
        candidates_of(CalibrationOptions(orders=orders), frames)
