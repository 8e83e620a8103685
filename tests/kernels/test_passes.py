"""Passes between products and attention: kernels and XLA against float64, what is refused, the code for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.inspect import aot
from pallas_kernels.passes import Projected, normed_qkv, quantized_rows, weight_only_matmul

BITS16 = [jnp.bfloat16, jnp.float16]
IMPLEMENTATIONS = ["triton", "xla"]
EPS = {jnp.bfloat16: 2**-8, jnp.float16: 2**-11}


def float64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def draw(shape, dtype, seed, scale=1.0, mean=0.0):
    return jnp.asarray(mean + scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def how(implementation):
    return {"implementation": implementation, "interpret": implementation == "triton"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", BITS16)
@pytest.mark.parametrize(("depth", "is_modulated"), [(96, False), (96, True), (608, True)])
def test_rows_equal_float64(implementation, dtype, depth, is_modulated):
    """Each image has a modulation of its own; a row of zeros stays one, unless it is shifted. 608 take five pieces."""
    x = draw((2, 5, depth), dtype, 0, scale=3, mean=1).at[0, 2].set(0).at[1, 3, 7].set(1000)
    parts = draw((2, 1, depth), dtype, 1, 0.3), draw((2, 1, depth), dtype, 2, 0.3)
    values, scale = quantized_rows(x, jnp.int8, parts if is_modulated else None, **how(implementation))
    wanted = float64(x)
    if is_modulated:
        wanted = wanted - wanted.mean(-1, keepdims=True)
        wanted /= np.sqrt(np.square(wanted).mean(-1, keepdims=True) + 1e-6)
        wanted = wanted * (1 + float64(parts[0])) + float64(parts[1])
    most = np.abs(wanted).max(-1)
    rounding = (3 * EPS[dtype] if is_modulated and implementation == "xla" else 1e-5) * most[..., None]
    assert values.dtype == jnp.int8 and scale.shape == (2, 5)
    back = float64(values) * np.asarray(scale, np.float64)[..., None]
    assert (np.abs(back - wanted) <= most[..., None] / 127 * 0.501 + rounding).all()
    assert (np.abs(float64(values)).max(-1) == np.where(most > 0, 127, 0)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", BITS16)
@pytest.mark.parametrize(
    ("lengths", "head_dim", "is_normed", "is_rotated", "which"),
    [
        ((37, 50), 64, True, True, None),
        ((16,), 128, True, True, [2, 0]),
        ((48, 19), 64, True, False, [1]),
        ((20,), 64, False, True, None),
        ((5, 3), 64, False, False, [2, 1]),
    ],
    ids=["joint", "named", "joint, named, no positions", "no norms", "copies"],
)
def test_queries_keys_and_values_equal_float64(implementation, dtype, lengths, head_dim, is_normed, is_rotated, which):
    made = 3 if which is None else len(which)
    streams, wanted = [], []
    for number, length in enumerate(lengths):
        heads = draw((2, length, 3 * made, head_dim), dtype, number, 2)
        norms = tuple(draw(head_dim, dtype, 10 * number + i, 0.2, 1) for i in (1, 2)) if is_normed else None
        streams.append(Projected(heads, 3, norms, None if which is None else jnp.array(which, jnp.int32)))
        parts = np.split(float64(heads), 3, axis=2)
        for i, norm in enumerate(norms or ()):
            parts[i] *= float64(norm) / np.sqrt(np.square(parts[i]).mean(-1, keepdims=True) + 1e-6)
        wanted.append(parts)
    wanted = [np.concatenate(parts, axis=1) for parts in zip(*wanted, strict=True)]
    angle = np.random.default_rng(9).uniform(0, 6, (sum(lengths), head_dim // 2))
    for i in range(2 * is_rotated):
        turned = (wanted[i][..., ::2] + 1j * wanted[i][..., 1::2]) * np.exp(1j * angle)[:, None]
        wanted[i] = np.stack([turned.real, turned.imag], axis=-1).reshape(wanted[i].shape)
    rope = tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)) if is_rotated else None
    for out, exact in zip(normed_qkv(streams, rope, **how(implementation)), wanted, strict=True):
        assert out.dtype == dtype and out.shape == (2, sum(lengths), 3, head_dim)
        out = float64(out if which is None else out[:, :, jnp.array(which)])
        assert np.abs(out - exact).max() < 2.5 * EPS[dtype] * np.abs(exact).max()
        assert np.linalg.norm(out - exact) < 0.8 * EPS[dtype] * np.linalg.norm(exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", BITS16)
@pytest.mark.parametrize(("rows", "has_bias"), [(1, True), (3, False)])
def test_weights_alone_equal_float64(implementation, dtype, rows, has_bias):
    """The second of three layers, at a depth of three pieces."""
    rng = np.random.default_rng(0)
    x, w = draw((rows, 384), dtype, 1), jnp.asarray(rng.integers(-127, 128, (3, 48, 384)), jnp.int8)
    scale, bias = jnp.asarray(rng.uniform(0.5, 2, (3, 48)) / 100, jnp.float32), draw((3, 48), dtype, 2)
    given = bias if has_bias else None
    out = weight_only_matmul(x, w, scale, given, layer=1, **how(implementation))
    wanted = float64(x) @ float64(w[1]).T * float64(scale[1]) + (float64(bias[1]) if has_bias else 0)
    assert out.dtype == dtype and np.abs(float64(out) - wanted).max() < 2 * EPS[dtype] * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"dtype": jnp.float8_e4m3fn}, "it writes int8, not float8_e4m3fn; pass implementation='xla'"),
        ({"x": jnp.zeros((1, 8200), jnp.bfloat16)}, "it takes rows of 8192 values at most, not 8200"),
        ({"x": jnp.zeros((1, 8))}, "it takes 16 bits, not float32"),
    ],
    ids=["float8", "wide", "float32"],
)
def test_what_the_kernel_for_rows_lacks(given, why):
    arguments = {"x": jnp.zeros((1, 8), jnp.bfloat16), "dtype": jnp.int8} | given
    with pytest.raises(NotImplementedError, match=why):
        quantized_rows(**arguments, implementation="triton", interpret=True)
    assert quantized_rows(**arguments)[0].dtype == arguments["dtype"]


def test_shapes_that_contradict_each_other_are_refused(no_shape_checks):
    """A kernel would read beyond the end of an array."""
    x, parts = jnp.zeros((2, 5, 8), jnp.bfloat16), (jnp.zeros((3, 1, 8), jnp.bfloat16),) * 2
    with pytest.raises(ValueError, match=r"scale and shift must be \[2, 1, 8\] or \[1, 1, 8\], got \(3, 1, 8\)"):
        quantized_rows(x, jnp.int8, parts)
    streams = [Projected(jnp.zeros((1, length, 6, 64)), 2) for length in (4, 3)]
    with pytest.raises(ValueError, match=r"rope must be \[7, 32\], got \(4, 32\)"):
        normed_qkv(streams, (jnp.zeros((4, 32)),) * 2)
    with pytest.raises(ValueError, match=r"heads must be \[1, 4, 9, 64\], got \(1, 4, 6, 64\)"):
        normed_qkv([Projected(streams[0].heads, 3)])
    with pytest.raises(ValueError, match=r"norms must be \[64\], got \(32,\)"):
        normed_qkv([Projected(streams[0].heads, 2, (jnp.zeros(32),) * 2)])
    w = jnp.zeros((2, 16, 128), jnp.int8)
    with pytest.raises(ValueError, match=r"w must be \[2, 16, 64\], got \(2, 16, 128\)"):
        weight_only_matmul(jnp.zeros((1, 64)), w, jnp.ones((2, 16)), layer=0)
    with pytest.raises(ValueError, match=r"column_scale and bias must be \[2, 16\], got \(2, 8\)"):
        weight_only_matmul(jnp.zeros((1, 128)), w, jnp.ones((2, 16)), jnp.ones((2, 8)), layer=0)


def test_faults_of_passes_are_named():
    stream = Projected(jnp.zeros((1, 2, 3, 32), jnp.bfloat16), 1)
    with pytest.raises(NotImplementedError, match="it takes heads of 64 or 128, not 32"):
        normed_qkv([stream], implementation="triton", interpret=True)
    with pytest.raises(NotImplementedError, match="it runs on NVIDIA GPUs, the default device is 'cpu'"):
        quantized_rows(jnp.zeros((1, 8), jnp.bfloat16), jnp.int8, implementation="triton")
    w, scale = jnp.zeros((1, 16, 128), jnp.int8), jnp.ones((1, 16))
    with pytest.raises(NotImplementedError, match=r"it takes 4 rows at most, .*, not \(5, 128, 16\)"):
        weight_only_matmul(jnp.zeros((5, 128), jnp.bfloat16), w, scale, layer=0, implementation="triton")
    with pytest.raises(ValueError, match="implementation='mosaic' is not one of"):
        normed_qkv([stream], implementation="mosaic")
    with pytest.raises(ValueError, match="interpret=True is for the kernel"):
        normed_qkv([stream], interpret=True)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("batch", "depth", "is_modulated"), [(1, 3072, True), (1, 3072, False), (2, 2432, True), (2, 1536, True)]
)
@pytest.mark.parametrize("gpu", ["h200", "a100"])
def test_rows_spill_nothing(gpu, batch, depth, is_modulated):
    target = aot.target(gpu)
    parts = (array(batch, 1, depth),) * 2 if is_modulated else None
    given = target.abstract((array(batch, 4096, depth), parts))
    compiled, kernels = aot.kernels(target, jax.jit(lambda x, parts: quantized_rows(x, jnp.int8, parts)), *given)
    (kernel,) = [kernel for kernel in kernels if kernel.name.startswith("quantized_rows")]
    assert kernel.spill_bytes == 0 and compiled.temp_bytes < 1000


@pytest.mark.aot
@pytest.mark.parametrize(
    ("lengths", "batch", "num_heads", "head_dim", "is_rotated", "named"),
    [
        ((512, 4096), 1, 24, 128, True, None),
        ((4608,), 1, 24, 128, True, 8),
        ((4096, 333), 2, 38, 64, False, None),
    ],
    ids=["FLUX.1-dev double", "FLUX.1-dev single, named", "SD3.5-large"],
)
@pytest.mark.parametrize("gpu", ["h200", "a100"])
def test_queries_keys_and_values_spill_nothing(gpu, lengths, batch, num_heads, head_dim, is_rotated, named):
    target = aot.target(gpu)
    norms = (array(head_dim),) * 2
    heads = [array(batch, length, 3 * (named or num_heads), head_dim) for length in lengths]
    which = None if named is None else array(named, dtype=jnp.int32)
    rope = (array(sum(lengths), head_dim // 2, dtype=jnp.float32),) * 2 if is_rotated else None

    @jax.jit
    def run(heads, norms, which, rope):
        return normed_qkv([Projected(one, num_heads, norms, which) for one in heads], rope)

    compiled, kernels = aot.kernels(target, run, *target.abstract((heads, norms, which, rope)))
    (kernel,) = [kernel for kernel in kernels if kernel.name.startswith("normed_qkv")]
    assert kernel.spill_bytes == 0
    assert compiled.temp_bytes < 1000, "heads are read where they lie, and nothing is copied"


@pytest.mark.aot
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 3072, 18432), (1, 3072, 9216), (2, 2432, 14592)])
@pytest.mark.parametrize("gpu", ["h200", "a100"])
def test_modulations_read_weights_where_they_lie(gpu, rows, depth, columns):
    target = aot.target(gpu)
    x, w = array(rows, depth), array(3, columns, depth, dtype=jnp.int8)
    given = x, w, array(3, columns, dtype=jnp.float32), array(3, columns), array(dtype=jnp.int32)
    run = jax.jit(lambda x, w, scale, bias, layer: weight_only_matmul(x, w, scale, bias, layer=layer))
    compiled, kernels = aot.kernels(target, run, *target.abstract(given))
    (kernel,) = [kernel for kernel in kernels if kernel.name.startswith("few_rows")]
    assert kernel.spill_bytes == 0 and compiled.temp_bytes < 1000
    assert "ld.global.v4.b32" in kernel.ptx, "16 weights at a time"
