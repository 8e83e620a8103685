"""Padding of text in a network's attention: what any `Attend` computes, finds out and remembers without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfa2_jax.calibration.attends import Budget, Trials, TryEverything
from dfa2_jax.calibration.baselines import SchemePlan
from dfa2_jax.nn.attention import BlockAttention, Dense, LayerPlan, Planned
from dfa2_jax.plan.method import Method
from dfa2_jax.report.attention_maps import Watching
from pallas_kernels import CACHED, FULL, Layout, arrow_attention

HEADS = 3
PADDED, LENGTHS = 9, (9, 4, 2, 7)
FIRST, LAST = (Layout(PADDED, 24, text_first) for text_first in (True, False))
LAYOUTS = pytest.mark.parametrize("layout", [FIRST, LAST], ids=["text first", "text last"])
CANDIDATES = Method("cached"), Method.arrow(3), Method.arrow(3, "time")


def drawn(layout, seed=0):
    """q, k, v and outputs of the step before; the padding of each sample is large, and shows wherever it is seen."""
    x = np.random.default_rng(seed).standard_normal((4, len(LENGTHS), layout.length, HEADS, 8), np.float32)
    for sample, length in enumerate(LENGTHS):
        x[:, sample, layout.text][:, length:] = 20.0
    return tuple(map(jnp.asarray, x))


def cut(x, layout, sample):
    """A sample [1, T, N, H] without its padding, and its layout."""
    keep = np.arange(layout.length) - layout.text.start
    keep = (keep < LENGTHS[sample]) | (keep >= layout.num_text)
    return x[sample : sample + 1, keep], Layout(LENGTHS[sample], layout.num_visual, layout.text_first)


def attended(attend, arrays, layout, memory, plan):
    """A block's attention with padded text; memory is of a stack of one layer."""
    attention = BlockAttention(attend, "", {"attn": memory}, {"attn": plan}, jnp.array(LENGTHS, jnp.int32))
    out = attention("attn", lambda heads=None: arrays, layout)
    return out, attention.memory["attn"]


def layer_plan(**fields):
    return LayerPlan(jnp.int32(0), jnp.int32(1), **fields)


@LAYOUTS
@pytest.mark.parametrize("window", [None, [FULL, 3, CACHED]], ids=["dense", "planned"])
def test_outputs_are_those_of_cut_text(layout, window):
    *qkv, before = drawn(layout)
    plan = layer_plan() if window is None else layer_plan(half_window=jnp.array(window, jnp.int32))
    attend = Dense() if window is None else Planned(skip_projections=False)
    out, _ = attended(attend, qkv, layout, None if window is None else before[None], plan)
    for sample in range(len(LENGTHS)):
        (*some, cached), short = [cut(x, layout, sample)[0] for x in (*qkv, before)], cut(before, layout, sample)[1]
        want = arrow_attention(*some, plan.half_window, layout=short, cache=cached, implementation="reference")
        np.testing.assert_allclose(cut(out, layout, sample)[0], want, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_errors_are_over_tokens_that_are_no_padding(layout, chunk):
    """All samples count together, however they are cut into chunks whose texts differ in length."""
    *qkv, before = drawn(layout)
    attend = TryEverything(CANDIDATES, Budget.of(1.0, None, HEADS), (2, 2), chunk, frames=4)
    start = Trials.of_caches(before[None], len(CANDIDATES))
    _, trials = jax.jit(lambda *x: attended(attend, x, layout, start, layer_plan()))(*qkv)
    dense, *tried = [], [], [], []
    for sample in range(len(LENGTHS)):
        *some, cached = [cut(x, layout, sample)[0] for x in (*qkv, before)]
        short = cut(before, layout, sample)[1]
        places, grid = np.arange(short.length), np.arange(24).reshape(4, 6)
        places[short.visual] = places[short.visual][grid.T.ravel()]
        options = {"layout": short, "implementation": "reference"}
        every = jnp.full(HEADS, 4, jnp.int32)
        over_time = arrow_attention(*(x[:, places] for x in some), every, **options)[:, np.argsort(places)]
        outputs = arrow_attention(*some, **options), cached, arrow_attention(*some, every, **options), over_time
        for kept, output in zip((dense, *tried), outputs, strict=True):
            kept.append(output[0])
    exact = np.concatenate(dense)
    for number, candidate in enumerate(tried):
        error = np.square(np.concatenate(candidate) - exact).mean((0, 2)) / exact.var((0, 2))
        np.testing.assert_allclose(trials.errors[0, :, number], error, rtol=1e-4)


@LAYOUTS
def test_heads_are_watched_without_padding(layout):
    *qkv, _ = drawn(layout)
    _, seen = attended(Watching((2, 6)), qkv, layout, jnp.zeros((1, HEADS, 3)), layer_plan())
    want = []
    for sample in range(len(LENGTHS)):
        some, short = [cut(x, layout, sample)[0] for x in qkv], cut(qkv[0], layout, sample)[1]
        attention = BlockAttention(Watching((2, 6)), "", {"attn": jnp.zeros((1, HEADS, 3))}, {"attn": layer_plan()})
        attention("attn", lambda heads=None, some=some: some, short)
        want.append(attention.memory["attn"])
    np.testing.assert_allclose(seen, np.mean(want, axis=0), atol=1e-5)


def test_layers_that_see_no_text_know_nothing_of_its_padding():
    alone = Layout(0, 24, True)
    qkv = [x[:, FIRST.visual] for x in drawn(FIRST)[:3]]
    out, _ = attended(Dense(), qkv, alone, None, layer_plan())
    np.testing.assert_allclose(out, arrow_attention(*qkv, layout=alone, implementation="reference"), atol=1e-5)


def test_attention_that_knows_no_padding_is_refused():
    plan = SchemePlan(jnp.int32(0), jnp.zeros(HEADS, jnp.int32))
    with pytest.raises(NotImplementedError, match="Dense sees all text, and this text is padded"):
        attended(Dense(), drawn(FIRST)[:3], FIRST, None, plan)
