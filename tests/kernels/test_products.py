"""Products of 8-bit operands: every implementation against float64, what is refused, and the code for Hopper."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import NEEDS_MOSAIC

from pallas_kernels.backends.base import Device
from pallas_kernels.backends.product import Product
from pallas_kernels.inspect import aot
from pallas_kernels.inspect.hlo import weight_copies
from pallas_kernels.products import choose_product, mosaic_lacks, quantized_matmul

E4M3, INT8 = jnp.float8_e4m3fn, jnp.int8
IMPLEMENTATIONS = ["xla", pytest.param("mosaic", marks=NEEDS_MOSAIC)]


def float64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def draw(rng, shape, dtype):
    x = rng.normal(size=shape)
    return jnp.asarray(np.round(x * 30).clip(-127, 127) if dtype == INT8 else x * 20).astype(dtype)


def operands(dtype, rows, depth, columns, layers=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": draw(rng, (rows, depth), dtype),
        "w": draw(rng, (layers, columns, depth), dtype),
        "row_scale": jnp.asarray(rng.uniform(0.5, 2, rows) / 1e3, jnp.float32),
        "column_scale": jnp.asarray(rng.uniform(0.5, 2, (layers, columns)) / 10, jnp.float32),
        "bias": jnp.asarray(rng.normal(size=(layers, columns)), jnp.bfloat16),
    }


def exact(x, w, row_scale, column_scale, bias=None, *, layer, second=None):
    total = float64(x) @ float64(w[layer]).T
    if second is not None:
        total += float64(second[0]) @ float64(second[1][layer]).T
    total *= float64(row_scale)[:, None] * float64(column_scale[layer])
    return total if bias is None else total + float64(bias[layer])


def error(result, wanted):
    return np.linalg.norm(float64(result) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [E4M3, INT8])
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "second", "heads", "has_bias"),
    [
        (64, 128, 128, None, None, True),
        (200, 384, 256, None, None, False),  # a ragged tile of rows
        (129, 256, 384, 128, None, True),
        (130, 128, 512, None, (2, [5, 0]), True),
        (200, 128, 384, 256, (3, [1]), True),
    ],
    ids=["one tile", "ragged", "two pairs", "heads", "two pairs of one head"],
)
def test_products_equal_float64(implementation, dtype, rows, depth, columns, second, heads, has_bias):
    """Within the rounding of the result, bfloat16."""
    given = operands(dtype, rows, depth, columns)
    given |= {"layer": 1} | ({} if has_bias else {"bias": None})
    if second is not None:
        rng = np.random.default_rng(1)
        given["second"] = draw(rng, (rows, second), dtype), draw(rng, (2, columns, second), dtype)
    wanted, options = exact(**given), {}
    if heads is not None:
        number, which = heads
        size = 128 if number == 3 else 64
        wanted = wanted.reshape(rows, -1, size)[:, which].reshape(rows, -1)
        options = {"heads": jnp.array(which, jnp.int32), "head_dim": size}
    result = quantized_matmul(**given, **options, implementation=implementation, interpret=implementation == "mosaic")
    assert result.dtype == jnp.bfloat16 and error(result, wanted) < 0.002


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gelu_becomes_eight_bits_and_saturates(implementation):
    """Outliers far above what e4m3 holds become its largest value, 448: never NaN, which XLA's own cast gives."""
    given = operands(E4M3, 128, 128, 128)
    given["column_scale"] = given["column_scale"].at[1, 7].set(1e6)
    wanted = np.asarray(jax.nn.gelu(exact(**given, layer=1).astype(np.float32), approximate=True), np.float64)
    options = {"activation": "gelu_tanh", "out_dtype": E4M3, "out_scale": jnp.float32([0.01])}
    interpret = implementation == "mosaic"
    result = quantized_matmul(**given, layer=1, **options, implementation=implementation, interpret=interpret)
    assert result.dtype == E4M3
    values = float64(result)
    assert np.isfinite(values).all() and values[:, 7].max() == 448 and values.min() >= -18
    rows = jnp.linspace(0.01, 0.02, 128, dtype=jnp.float32)
    by_rows = quantized_matmul(
        **given, layer=1, **options | {"out_scale": rows}, implementation=implementation, interpret=interpret
    )
    assert (
        error(
            by_rows[:, :7].astype(jnp.float32) * rows[:, None], wanted[:, :7].clip(max=448 * np.asarray(rows)[:, None])
        )
        < 0.03
    )
    assert np.linalg.norm(values * 0.01 - wanted.clip(max=4.48)) / np.linalg.norm(wanted.clip(max=4.48)) < 0.03
    wide = quantized_matmul(
        **given, layer=1, activation="gelu_tanh", implementation=implementation, interpret=interpret
    )
    assert error(wide, wanted) < 0.002


def test_one_layer_needs_no_stack():
    given = operands(INT8, 64, 128, 128)
    alone = given | {name: given[name][1] for name in ("w", "column_scale", "bias")}
    stacked = quantized_matmul(**given, layer=1)
    np.testing.assert_array_equal(float64(quantized_matmul(**alone)), float64(stacked))
    one = quantized_matmul(**alone | {"row_scale": jnp.float32([2.0])})
    all_of_them = quantized_matmul(**alone | {"row_scale": jnp.full(64, 2.0, jnp.float32)})
    np.testing.assert_array_equal(float64(one), float64(all_of_them))


def test_a_scan_reads_its_layer():
    given = operands(E4M3, 64, 128, 128, layers=3)

    @jax.jit
    def run(given):
        return jax.lax.map(lambda layer: quantized_matmul(**given, layer=layer), jnp.arange(3))

    for layer, result in enumerate(run(given)):
        assert error(result, exact(**given, layer=layer)) < 0.002


FAULTS = {
    "dtypes": (
        {"w": jnp.zeros((2, 128, 128), INT8)},
        "must be float8_e4m3fn or int8, all of them, got float8_e4m3fn and",
    ),
    "wide": ({"x": jnp.zeros((64, 128))}, "got float32 and float8_e4m3fn"),
    "no layer": ({"layer": None}, r"must be \[M, K\] and \[E, K\], got \(64, 128\), \(2, 128, 128\)"),
    "depth": ({"x": jnp.zeros((64, 256), E4M3)}, r"and \[L, E, K\], got \(64, 256\), \(2, 128, 128\)"),
    "rows": ({"row_scale": jnp.ones(63)}, r"scales must be \[64\] or \[1\], and \[2, 128\], got \(63,\)"),
    "bias": ({"bias": jnp.ones((2, 64))}, r"bias must be \[2, 128\] as the columns, got \(2, 64\)"),
    "second": (
        {"second": (jnp.zeros((32, 128), E4M3), jnp.zeros((2, 128, 128), E4M3))},
        r"both pairs must have one result, got \(64, 128\) x \(2, 128, 128\) and \(32, 128\)",
    ),
    "heads": ({"heads": jnp.zeros(1, jnp.int32), "head_dim": 96}, "128 columns are no heads of head_dim=96"),
    "scale": ({"out_dtype": E4M3}, "out_scale is of out_dtype=float8_e4m3fn, got no out_scale and float8_e4m3fn"),
    "no scale": ({"out_scale": jnp.ones(1)}, "out_scale is of out_dtype=float8_e4m3fn, got an out_scale and bfloat16"),
    "out rows": (
        {"out_dtype": E4M3, "out_scale": jnp.ones(2)},
        r"out_scale must be \[64\] or \[1\], got \(2,\)",
    ),
    "activation": ({"activation": "relu"}, "activation='relu' is neither None nor 'gelu_tanh'"),
    "name": ({"implementation": "triton"}, r"implementation='triton' is not one of \('mosaic', 'xla'\)"),
    "interpret": ({"implementation": "xla", "interpret": True}, "interpret=True is for the kernel"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault, no_shape_checks):
    change, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        quantized_matmul(**{**operands(E4M3, 64, 128, 128), "layer": 1, **change})


def described(rows=4608, depth=3072, columns=9216, heads=None, head_dim=128, dtype=E4M3, second=None, **more):
    """A product of shapes alone."""

    def array(shape, kind=jnp.float32):
        return jax.ShapeDtypeStruct(shape, kind)

    pairs = [(array((rows, k), dtype), array((2, columns, k), dtype)) for k in (depth, second) if k is not None]
    return Product(
        pairs=tuple(pairs), row_scale=array((rows,)), column_scale=array((2, columns)), bias=array((2, columns)),
        layer=array((), jnp.int32), heads=heads, head_dim=head_dim, activation=None,
        out_dtype=jnp.dtype(jnp.bfloat16), out_scale=None, **more,
    )  # fmt: skip


H200 = Device(name="NVIDIA H200", capability=9.0)


@NEEDS_MOSAIC
@pytest.mark.parametrize(
    ("product", "device", "why"),
    [
        (described(), replace(H200, capability=10.0), "is for compute capability 9"),
        (described(depth=3000), H200, "sums 128 values at a time, .*4608, 3000, 9216"),
        (described(columns=192), H200, "of 128 columns at least"),
        (replace(described(), out_dtype=jnp.dtype("float32")), H200, "gives 16 or 8 bits, not float32"),
        (described(rows=1), H200, "takes 64 rows at least, not 1"),
        (described(heads=jax.ShapeDtypeStruct((4,), jnp.int32), head_dim=32), H200, "heads of 64 or 128, not 32"),
        (described(), Device(name="cpu"), "the default device is 'cpu'"),
    ],
    ids=["Blackwell", "depth", "columns", "float32", "rows", "heads", "CPU"],
)
def test_what_the_kernel_lacks_goes_to_xla(product, device, why, no_shape_checks):
    lacking = mosaic_lacks(product, device)
    assert lacking is not None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(lacking)
    assert choose_product(product, device).implementation == "xla"
    assert mosaic_lacks(described(), H200) is None and choose_product(described(), H200).implementation == "mosaic"


def test_before_jax_0_11_products_are_xlas(monkeypatch, no_shape_checks):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "needs jax 0.11" in choose_product(described(), H200).why
    with pytest.raises(NotImplementedError, match="needs jax 0.11 or newer .*; pass implementation='xla'"):
        quantized_matmul(**operands(E4M3, 64, 128, 128), layer=1, implementation="mosaic", interpret=True)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("dtype", "rows", "depth", "columns", "options"),
    [
        (E4M3, 4608, 3072, 9216, {}),
        (E4M3, 4608, 3072, 12288, {"activation": "gelu_tanh", "out_dtype": E4M3}),
        (E4M3, 4608, 3072, 3072, {"second": 12288}),
        (E4M3, 4608, 3072, 9216, {"heads": 30}),
        (INT8, 4608, 12288, 3072, {}),
        (INT8, 4429, 2432, 9728, {}),
        (E4M3, 8858, 1536, 4608, {"heads": 20, "head_dim": 64}),
    ],
    ids=["FLUX qkv", "FLUX up", "FLUX single", "FLUX heads", "FLUX down", "SD3.5-large up", "SD3.5-medium heads"],
)
def test_products_spill_nothing_and_read_weights_where_they_lie(dtype, rows, depth, columns, options):
    target, array = aot.target("h200"), jax.ShapeDtypeStruct
    given = {
        "x": array((rows, depth), dtype), "row_scale": array((rows,), jnp.float32), "layer": array((), jnp.int32),
    }  # fmt: skip
    weights = {
        "w": array((3, columns, depth), dtype), "column_scale": array((3, columns), jnp.float32),
        "bias": array((3, columns), jnp.bfloat16),
    }  # fmt: skip
    static = {name: value for name, value in options.items() if name not in ("second", "heads")}
    if "second" in options:
        given["x2"] = array((rows, options["second"]), dtype)
        weights["w2"] = array((3, columns, options["second"]), dtype)
    if "heads" in options:
        given["heads"] = array((options["heads"],), jnp.int32)
    if "out_dtype" in options:
        given["out_scale"] = array((rows,), jnp.float32)

    @jax.jit
    def multiply(given, weights):
        second = {"second": (given.pop("x2"), weights.pop("w2"))} if "x2" in given else {}
        return quantized_matmul(**given, **weights, **second, **static, implementation="mosaic")

    compiled, kernels = aot.kernels(target, multiply, *target.abstract((given, weights)))
    assert not weight_copies(compiled.hlo, "weights")
    assert compiled.temp_bytes < 100_000  # scales, padded to whole tiles
    (kernel,) = [kernel for kernel in kernels if kernel.name.startswith("quantized_matmul_mosaic")]
    assert kernel.spill_bytes == 0 and kernel.wgmma > 0
    assert ("s8.s8" if dtype == INT8 else "e4m3.e4m3") in kernel.ptx
    assert aot.blocks_per_sm(kernel, target) == 1
