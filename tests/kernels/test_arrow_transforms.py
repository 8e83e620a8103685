"""Arrow attention under JAX's transformations, its defaults, and what it refuses."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    IMPLEMENTATIONS,
    NEEDS_JAX_TRITON,
    NEEDS_MOSAIC,
    NESTED,
    assert_close,
    attention,
    draw,
    dtype_for,
    kept_pairs,
    options_for,
    use_tiles,
)

from pallas_kernels import (
    CACHED,
    FULL,
    Layout,
    arrow_attention,
    arrow_implementation,
    dense_implementation,
    nested_arrow_attention,
)
from pallas_kernels.backends.jax_triton import backend as jax_triton
from pallas_kernels.backends.triton.tiles import Tiles


def arguments(attend):
    dtype = dtype_for(attend.keywords["implementation"])
    q, k, v, cache = (draw((2, LAYOUT.length, 2, 64), seed, dtype) for seed in range(4))
    return q, k, v, cache


LAYOUT = Layout(20, 100, True)


@pytest.fixture(params=["reference", *IMPLEMENTATIONS])
def attend(request, monkeypatch):
    use_tiles(monkeypatch, Tiles(32, 32, 4, 2, 64))
    monkeypatch.setattr("pallas_kernels.backends.blockwise.SHORT", 0)
    return partial(arrow_attention, layout=LAYOUT, **options_for(request.param))


WINDOW = jnp.array([CACHED, 7], jnp.int32)


def test_vmap(attend):
    q, k, v, cache = (jnp.stack([x, x[::-1] * 2]) for x in arguments(attend))
    windows_ = jnp.array([[CACHED, 7], [FULL, 0]], jnp.int32)
    got = jax.jit(jax.vmap(lambda q, k, v, w, c: attend(q, k, v, w, cache=c)))(q, k, v, windows_, cache)
    for i in range(2):
        assert_close(got[i], attend(q[i], k[i], v[i], windows_[i], cache=cache[i]), atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", *NESTED])
def test_nested_windows_under_transformations(implementation, monkeypatch):
    use_tiles(monkeypatch, Tiles(32, 32, 4, 2, 64))
    nested = partial(nested_arrow_attention, layout=LAYOUT, **options_for(implementation))
    q, k, v = (draw((2, 1, LAYOUT.length, 2, 64), seed, dtype_for(implementation)) for seed in range(3))
    ladders = jnp.array([[3, 50], [0, 7]], jnp.int32)
    want = jnp.stack([nested(q[i], k[i], v[i], ladders[i]) for i in range(2)])
    assert_close(jax.jit(jax.vmap(nested))(q, k, v, ladders), want, atol=1e-6)
    scanned = jax.jit(lambda *args: jax.lax.scan(lambda _, x: (None, nested(*x)), None, args)[1])(q, k, v, ladders)
    assert_close(scanned, want, atol=1e-6)
    branched = jax.jit(lambda p, x: jax.lax.cond(p, lambda x: nested(*x), lambda x: jnp.stack([x[0]] * 3), x))
    assert_close(branched(True, (q[0], k[0], v[0], ladders[0])), want[0], atol=1e-6)
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda q: nested(q, k[0], v[0], ladders[0]).astype(jnp.float32).sum())(q[0])


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


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "triton", IMPLEMENTATIONS[-1]])
def test_shard_map_needs_no_collectives(implementation):
    """In a process of its own, whose CPU counts as two devices. Mosaic's interpret mode keeps its state for one device
    at a time."""
    options, dtype = options_for(implementation), dtype_for(implementation).dtype.name
    code = f"""
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from pallas_kernels import CACHED, Layout, arrow_attention

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)
layout, window = Layout(20, 100, True), jnp.array([CACHED, 7], jnp.int32)
q, k, v, cache = (jax.random.normal(jax.random.key(i), (2, 120, 2, 64), {dtype!r}) for i in range(4))
attend = lambda q, k, v, w, c: arrow_attention(q, k, v, w, layout=layout, cache=c, **{options})
want = np.asarray(jax.jit(attend)(q, k, v, window, cache), np.float32)
mesh = Mesh(np.array(jax.devices()), ("x",))
assert mesh.size == 2
for tokens, heads in ((P(None, None, "x"), P("x")), (P("x"), P())):  # over heads, and over the batch
    specs = tokens, tokens, tokens, heads, tokens
    sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False))
    arrays = [jax.device_put(x, jax.sharding.NamedSharding(mesh, s)) for x, s in zip((q, k, v, window, cache), specs)]
    compiled = sharded.lower(*arrays).compile()
    assert not re.search("all-gather|all-reduce|all-to-all|collective", compiled.as_text())
    np.testing.assert_allclose(np.asarray(compiled(*arrays), np.float32), want, atol=1e-6)
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_first_program_of_a_process_is_traced_once(implementation):
    """Its trace imports the kernel, and some modules of JAX add to jit's key when they are imported."""
    code = f"""
import jax, jax.numpy as jnp
from pallas_kernels import Layout, arrow_attention

traced, q = [], jax.ShapeDtypeStruct((1, 120, 2, 64), jnp.bfloat16)

@jax.jit
def run(q, window):
    traced.append(window)
    return arrow_attention(q, q, q, window, layout=Layout(20, 100, True), **{options_for(implementation)})

for _ in range(2):
    run.trace(q, jnp.array([3, -1]))
assert len(traced) == 1, traced
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_new_plan_compiles_nothing(attend):
    q, k, v, cache = arguments(attend)
    attend(q, k, v, WINDOW, cache=cache)  # the first in interpret mode imports what adds to jit's key (jax 0.11)
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


@NEEDS_MOSAIC
def test_dense_attention_by_mosaic_has_gradients():
    layout = Layout(5, 70, True)
    q, k, v = (draw((1, 75, 2, 64), seed, jnp.bfloat16) for seed in range(3))
    mosaic = partial(arrow_attention, layout=layout, implementation="mosaic", interpret=True)
    assert_close(mosaic(q, k, v), attention(q, k, v, kept_pairs([FULL, FULL], layout)), 0.02)

    def gradients(attend):
        return jax.grad(lambda *x: jnp.square(attend(*x).astype(jnp.float32)).sum(), argnums=(0, 1, 2))(q, k, v)

    expected = gradients(partial(arrow_attention, layout=layout, implementation="blockwise"))
    for got, want in zip(gradients(mosaic), expected, strict=True):
        assert np.abs(np.asarray(want, np.float32)).max() > 0.1
        np.testing.assert_array_equal(got, want)
    with pytest.raises(NotImplementedError, match=r"every query: q.shape\[1\]=70 but k.shape\[1\]=75"):
        mosaic(q[:, :70], k, v)


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
        ({"cache": Q[None], "layer": 0.9}, r"one integer, got float32 \(\): 0.9"),
        ({"cache": Q[None], "layer": False}, "one integer.*False"),
        ({"cache": Q[None], "layer": jnp.zeros(1, jnp.int32)}, r"one integer, got int32 \(1,\)"),
        ({"half_window": [0, 1]}, r"array, int32 \[2\], got \[0, 1\]"),
        ({"layout": (2, 8, True)}, r"must be a Layout, got \(2, 8, True\)"),
        ({name: Q[:0] for name in "qkv"}, r"hold nothing: q.shape=\(0, 10, 2, 8\)"),
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
    ("counts", "message"),
    [
        ((2.5, 8), "num_text=2.5 and self.num_visual=8 must be integers"),
        ((-1, 8), "num_text=-1 and self.num_visual=8 must not be negative"),
        ((0, 0), "nor both 0"),
    ],
)
def test_a_layout_counts_tokens(counts, message):
    with pytest.raises(ValueError, match=message):
        Layout(*counts, text_first=True)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("half_windows", "message"),
    [
        (jnp.array([3, 3], jnp.int32), r"increasing and not negative, got \[3, 3\]"),
        (jnp.array([-1, 3], jnp.int32), r"\[-1, 3\]"),
        (jnp.array([[3]], jnp.int32), r"int32 \[1\], got int32 \(1, 1\)"),
        (jnp.array([3.0]), "float32"),
        ([3, 4], r"array, int32 \[2\], got \[3, 4\]"),
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


@pytest.mark.parametrize("installed", [{"triton": "3.6.0"}, {"jax-triton": "0.4.1", "triton": "3.7.0"}])
def test_jax_triton_names_the_line_that_installs_it(installed, monkeypatch):
    monkeypatch.setattr(jax_triton, "_version", lambda name: installed.get(name, "none"))
    why = jax_triton.missing()
    assert "pip install jax-triton==0.3.1 triton==3.6.0" in why
    assert all(version in why for version in installed.values())


@NEEDS_JAX_TRITON
def test_jax_triton_has_no_nested_kernel():
    q = draw((1, 10, 2, 64))
    with pytest.raises(NotImplementedError, match="no nested kernel; pass None or 'triton'"):
        nested_arrow_attention(
            q, q, q, jnp.ones(1, jnp.int32), layout=Layout(2, 8, True), implementation="jax_triton", interpret=True
        )


def programs_for(gpu):
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize(
    ("gpu", "dim", "dtype", "implementation"),
    [
        ("NVIDIA H200", 64, jnp.bfloat16, "mosaic"),
        ("NVIDIA H100 80GB HBM3", 128, jnp.bfloat16, "cudnn"),
        ("NVIDIA A100-SXM4-40GB", 64, jnp.bfloat16, "cudnn"),
        ("NVIDIA H200", 64, jnp.float32, "blockwise"),
    ],
)
def test_dense_attention_on_an_nvidia_gpu(gpu, dim, dtype, implementation):
    with programs_for(gpu):
        choice = dense_implementation(dtype, dim)
    older = jax.__version_info__ < (0, 11)
    assert choice.implementation == ("cudnn" if implementation == "mosaic" and older else implementation)


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
    with programs_for(gpu):
        choice = arrow_implementation(dtype, dim)
    if implementation == "mosaic" and jax.__version_info__ < (0, 11):
        assert choice.implementation == "triton" and "jax 0.11" in choice.why
    else:
        assert choice.implementation == implementation
