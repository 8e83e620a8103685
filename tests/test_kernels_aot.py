"""The kernels compiled for GPUs that are not here: what they spill, copy and issue."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Layout, aot, arrow_attention, nested_arrow_attention
from pallas_kernels.hlo import weight_copies
from pallas_kernels.tiles import tiles_for

SD3, FLUX = Layout(333, 4096, text_first=False), Layout(512, 4096, text_first=True)
HEADS = 24
FUSED_EXP2 = ("fma.rn.ftz.f32", "ex2.approx.ftz.f32")


def compiled_arrow(gpu, layout, head_dim, dtype, layers=None):
    """With a donated cache, or a stack of them."""
    target = aot.target(gpu)
    one = jax.ShapeDtypeStruct((1, layout.length, HEADS, head_dim), dtype)
    cache = one if layers is None else jax.ShapeDtypeStruct((layers, *one.shape), dtype)
    scalars = (
        jax.ShapeDtypeStruct((HEADS,), jnp.int32),
        *([] if layers is None else [jax.ShapeDtypeStruct((), jnp.int32)]),
    )

    @partial(jax.jit, donate_argnames="cache")
    def attend(q, k, v, cache, half_window, *layer):
        options = dict(zip(["layer"], layer, strict=False))
        return arrow_attention(q, k, v, half_window, layout=layout, cache=cache, **options)

    return target, *aot.kernels(target, attend, *target.abstract((one, one, one, cache, *scalars)))


@pytest.mark.aot
@pytest.mark.parametrize("gpu", aot.targets())
@pytest.mark.parametrize(
    ("layout", "head_dim", "dtype", "layers"),
    [
        (SD3, 64, jnp.bfloat16, None),
        (SD3, 64, jnp.float16, 3),
        (SD3, 64, jnp.float32, None),
        (FLUX, 128, jnp.bfloat16, 3),
        (FLUX, 128, jnp.float16, None),
        (FLUX, 128, jnp.float32, None),
    ],
)
def test_arrows_spill_nothing_and_copy_nothing(gpu, layout, head_dim, dtype, layers):
    target, compiled, kernels = compiled_arrow(gpu, layout, head_dim, dtype, layers)
    assert {kernel.name: kernel.spill_bytes for kernel in kernels if "arrow" in kernel.name} == {
        "arrow_attention": 0, "arrow_attention_merge": 0,
    }  # fmt: skip
    for name in ("q", "k", "v", "cache"):
        assert not weight_copies(compiled.hlo, name)
    assert compiled.alias_bytes == compiled.output_bytes  # the cache's buffer
    kernel = next(kernel for kernel in kernels if kernel.name == "arrow_attention")
    assert all(instruction in kernel.ptx for instruction in FUSED_EXP2)
    assert aot.blocks_per_sm(kernel, target) >= 1
    tensor_cores = (kernel.wgmma > 0, kernel.mma > 0)
    expected = (False, False) if dtype == jnp.float32 else (gpu == "h200", gpu == "a100")  # IEEE, not TF32
    assert tensor_cores == expected
    assert kernel.cp_async > 0, "loads do not run ahead"


@pytest.mark.aot
@pytest.mark.parametrize(
    ("layout", "head_dim", "interior", "edge", "blocks"), [(SD3, 64, 10, 14.5, 4), (FLUX, 128, 12, 16, 2)]
)
def test_instructions_per_score_on_h200(layout, head_dim, interior, edge, blocks):
    """Of the loops without and with masks. Fewer are possible in larger tiles, which are slower: fewer blocks fit."""
    target, _, kernels = compiled_arrow("h200", layout, head_dim, jnp.bfloat16)
    kernel = next(kernel for kernel in kernels if kernel.name == "arrow_attention")
    tiles = tiles_for("NVIDIA H200", head_dim, jnp.bfloat16)
    scores = tiles.rows * tiles.keys // (32 * tiles.warps)
    clean, masked = (loop.per_score(scores) for loop in kernel.softmax_loops)
    assert clean <= interior and clean < masked <= edge
    assert aot.blocks_per_sm(kernel, target) == blocks


@pytest.mark.aot
@pytest.mark.parametrize(("layout", "head_dim"), [(SD3, 64), (FLUX, 128)])
@pytest.mark.parametrize("gpu", aot.targets())
def test_nested_windows_spill_nothing(gpu, layout, head_dim):
    target = aot.target(gpu)
    one = jax.ShapeDtypeStruct((1, layout.length, HEADS, head_dim), jnp.bfloat16)
    windows = jax.ShapeDtypeStruct((4,), jnp.int32)
    attend = jax.jit(partial(nested_arrow_attention, layout=layout))
    compiled, kernels = aot.kernels(target, attend, *target.abstract((one, one, one, windows)))
    assert {k.name: k.spill_bytes for k in kernels if "arrow" in k.name} == {"nested_arrow_attention": 0}
    for name in "qkv":
        assert not weight_copies(compiled.hlo, name)


@pytest.mark.aot
def test_a_missing_program_is_named_with_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="No ptxas in .*pip install --no-deps 'nvidia-cuda-nvcc"):
        aot.kernels(aot.target("h200"), jax.jit(lambda x: x))
