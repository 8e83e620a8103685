"""The kernels compiled for GPUs that are not here: what they spill, copy and issue."""

import os
import re
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import Layout, arrow_attention, cost, nested_arrow_attention
from pallas_kernels.backends.triton.tiles import TABLE
from pallas_kernels.inspect import aot
from pallas_kernels.inspect.hlo import weight_copies

SD3, FLUX = Layout(333, 4096, text_first=False), Layout(512, 4096, text_first=True)
RAGGED = Layout(226, 3599, text_first=True)
HEADS = 24
FUSED_EXP2 = ("fma.rn.ftz.f32", "ex2.approx.ftz.f32")


def compiled_arrow(gpu, layout, head_dim, dtype, layers=None, implementation="triton"):
    """With a donated cache, or a stack of them."""
    target = aot.target(gpu)
    tensor = jax.ShapeDtypeStruct((1, layout.length, HEADS, head_dim), dtype)
    cache = tensor if layers is None else jax.ShapeDtypeStruct((layers, *tensor.shape), dtype)
    scalars = (
        jax.ShapeDtypeStruct((HEADS,), jnp.int32),
        *([] if layers is None else [jax.ShapeDtypeStruct((), jnp.int32)]),
    )

    @partial(jax.jit, donate_argnames="cache")
    def attend(q, k, v, cache, half_window, *layer):
        options = dict(zip(["layer"], layer, strict=False), implementation=implementation)
        return arrow_attention(q, k, v, half_window, layout=layout, cache=cache, **options)

    return target, *aot.kernels(target, attend, *target.abstract((tensor, tensor, tensor, cache, *scalars)))


def assert_spills_nothing(gpu, kernels):
    """On an A100, at some lengths, a thread keeps a few values aside between its loops, and reads none in them."""
    for kernel in kernels:
        assert kernel.spill_bytes <= (40 if gpu == "a100" else 0), kernel.name
        assert not any(loop.opcodes["LDL"] or loop.opcodes["STL"] for loop in kernel.softmax_loops), kernel.name


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
        (RAGGED, 64, jnp.bfloat16, 3),
        (RAGGED, 128, jnp.bfloat16, 3),
    ],
)
def test_arrows_spill_nothing_in_loops_and_copy_nothing(gpu, layout, head_dim, dtype, layers):
    target, compiled, kernels = compiled_arrow(gpu, layout, head_dim, dtype, layers)
    assert {kernel.name for kernel in kernels if "arrow" in kernel.name} == {"arrow_attention", "arrow_attention_merge"}
    assert_spills_nothing(gpu, kernels)
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


PADDED = Layout(256, 4080, text_first=False)
"""Text as HunyuanVideo has it."""


NEEDING_PADS = [
    ("arrow", "triton"),
    ("nested", "triton"),
    ("arrow", "mosaic"),
    ("nested", "mosaic"),
    ("arrow", "jax_triton"),
]


@pytest.mark.aot
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("operation", "implementation"), NEEDING_PADS)
def test_padded_text_costs_little(operation, implementation, head_dim):
    """Where data says how long text is, loops without masks take a tenth more at most, and spill nothing.

    Mosaic's nested kernel puts three values aside between its loops at a head_dim of 64.
    """
    target, options = aot.target("h200"), {"layout": PADDED, "implementation": implementation}
    tensor = jax.ShapeDtypeStruct((2, PADDED.length, HEADS, head_dim), jnp.bfloat16)
    windows, lengths = jax.ShapeDtypeStruct((HEADS,), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def arrow(q, k, v, windows, lengths):
        return arrow_attention(q, k, v, windows, text_length=lengths, **options)

    def nested(q, k, v, windows, lengths):
        return nested_arrow_attention(q, k, v, windows[:4], text_length=lengths, **options)

    instructions = []
    for given in (None, lengths):
        arguments = target.abstract((tensor, tensor, tensor, windows, given))
        compiled, kernels = aot.kernels(target, jax.jit(arrow if operation == "arrow" else nested), *arguments)
        kernel = next(kernel for kernel in kernels if "arrow_attention" in kernel.name and "merge" not in kernel.name)
        assert kernel.spill_bytes <= 16
        assert not any(loop.opcodes["LDL"] or loop.opcodes["STL"] for loop in kernel.softmax_loops)
        assert not any(weight_copies(compiled.hlo, name) for name in "qkv")
        instructions.append(min(loop.per_score(1) for loop in kernel.softmax_loops))
    assert instructions[1] <= 1.1 * instructions[0]


def code(target, kernel, head_dim):
    """As `pallas_kernels.cost` knows it."""
    tiles = TABLE[target.name, head_dim, 2]
    loops = [loop.per_score(tiles.rows * tiles.keys // (32 * tiles.warps)) for loop in kernel.softmax_loops]
    clean, masked = max(loops[:-1]), loops[-1]
    return cost.Code(aot.blocks_per_sm(kernel, target), clean, masked)


@pytest.mark.aot
@pytest.mark.parametrize("gpu", aot.targets())
@pytest.mark.parametrize(("layout", "head_dim"), [(SD3, 64), (FLUX, 128)])
def test_the_cost_model_knows_the_machine_code_of_arrows(gpu, layout, head_dim):
    """Fewer instructions are possible in larger tiles, which are slower: fewer blocks fit."""
    target, _, kernels = compiled_arrow(gpu, layout, head_dim, jnp.bfloat16)
    kernel = next(kernel for kernel in kernels if kernel.name == "arrow_attention")
    assert tuple(code(target, kernel, head_dim)) == pytest.approx(tuple(cost.ARROW[gpu, head_dim]), rel=0.01)


@cache
def compiled_nested(gpu, layout, head_dim):
    target = aot.target(gpu)
    tensor = jax.ShapeDtypeStruct((1, layout.length, HEADS, head_dim), jnp.bfloat16)
    windows = jax.ShapeDtypeStruct((4,), jnp.int32)
    attend = jax.jit(partial(nested_arrow_attention, layout=layout, implementation="triton"))
    return target, *aot.kernels(target, attend, *target.abstract((tensor, tensor, tensor, windows)))


@pytest.mark.aot
@pytest.mark.parametrize(("layout", "head_dim"), [(SD3, 64), (FLUX, 128)])
@pytest.mark.parametrize("gpu", aot.targets())
def test_nested_windows_spill_nothing_in_loops_and_copy_nothing(gpu, layout, head_dim):
    _, compiled, kernels = compiled_nested(gpu, layout, head_dim)
    assert {kernel.name for kernel in kernels if "arrow" in kernel.name} == {"nested_arrow_attention"}
    assert_spills_nothing(gpu, kernels)
    for name in "qkv":
        assert not weight_copies(compiled.hlo, name)


@pytest.mark.aot
@pytest.mark.parametrize(("layout", "head_dim"), [(SD3, 64), (FLUX, 128)])
@pytest.mark.parametrize("gpu", aot.targets())
def test_the_cost_model_knows_the_machine_code_of_nested_windows(gpu, layout, head_dim):
    target, _, kernels = compiled_nested(gpu, layout, head_dim)
    kernel = next(kernel for kernel in kernels if kernel.name == "nested_arrow_attention")
    assert tuple(code(target, kernel, head_dim)) == pytest.approx(tuple(cost.NESTED[gpu, head_dim]), rel=0.01)


@pytest.mark.aot
def test_nested_windows_share_a_pass_but_not_in_float32():
    """FLUX at 2048 px. In float32, where Triton's nested kernel spills and Mosaic has none, each window has its own."""
    layout = Layout(512, 16384, text_first=True)
    apart = {"arrow_attention", "arrow_attention_merge"}
    together = {"h200": {"nested_arrow_attention_mosaic_mosaic_gpu_kernel"}, "a100": {"nested_arrow_attention"}}
    for gpu, dtype in product(together, (jnp.bfloat16, jnp.float32)):
        target = aot.target(gpu)
        tensor = target.abstract(jax.ShapeDtypeStruct((1, layout.length, HEADS, 128), dtype))
        windows = target.abstract(jax.ShapeDtypeStruct((4,), jnp.int32))
        attend = jax.jit(partial(nested_arrow_attention, layout=layout))
        _, kernels = aot.kernels(target, attend, tensor, tensor, tensor, windows)
        expected = apart if dtype == jnp.float32 else together[gpu]
        assert {kernel.name for kernel in kernels if "arrow" in kernel.name} == expected


@pytest.mark.aot
def test_a_missing_program_is_named_with_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="No ptxas in .*pip install --no-deps 'nvidia-cuda-nvcc"):
        aot.kernels(aot.target("h200"), jax.jit(lambda x: x))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("layout", "head_dim", "layers"),
    [(SD3, 64, None), (SD3, 64, 3), (FLUX, 128, None), (FLUX, 128, 3)],
)
def test_mosaic_arrows_spill_nothing_copy_nothing_and_issue_little(layout, head_dim, layers):
    """Few instructions per score leave the schedulers to the tensor cores and the exponential unit."""
    from pallas_kernels.backends.mosaic.arrow import KEYS, ROWS  # needs a newer jax than the rest

    target, compiled, kernels = compiled_arrow("h200", layout, head_dim, jnp.bfloat16, layers, "mosaic")
    (kernel,) = (kernel for kernel in kernels if "arrow" in kernel.name)
    assert kernel.name.startswith("arrow_attention_mosaic")
    assert kernel.spill_bytes == 0
    assert kernel.wgmma > 0 and kernel.tma > 0
    assert re.findall(r"\batom\S+", kernel.ptx) == ["atom.relaxed.gpu.global.add.u32"]  # a block draws its next job
    assert not re.search(r"membar|fence\.(acq_rel|sc)", kernel.ptx)  # without a fence
    assert aot.blocks_per_sm(kernel, target) == 1  # it asks for no more blocks than multiprocessors
    for name in ("q", "k", "v", "cache"):
        assert not weight_copies(compiled.hlo, name)
    assert compiled.alias_bytes == compiled.output_bytes
    clean, masked = (loop.per_score(ROWS * KEYS // 128) for loop in kernel.softmax_loops)  # of a warpgroup's thread
    assert clean <= 7.5 and masked <= 11


@pytest.mark.aot
@pytest.mark.parametrize(("layout", "head_dim"), [(SD3, 64), (FLUX, 128)])
def test_mosaic_nested_arrows_spill_nothing_copy_nothing_and_issue_little(layout, head_dim):
    from pallas_kernels.backends.mosaic.nested import KEYS, ROWS  # needs a newer jax than the rest

    target = aot.target("h200")
    tensor = target.abstract(jax.ShapeDtypeStruct((1, layout.length, HEADS, head_dim), jnp.bfloat16))
    windows = target.abstract(jax.ShapeDtypeStruct((4,), jnp.int32))
    nested = jax.jit(partial(nested_arrow_attention, layout=layout, implementation="mosaic"))
    compiled, kernels = aot.kernels(target, nested, tensor, tensor, tensor, windows)
    (kernel,) = (kernel for kernel in kernels if "arrow" in kernel.name)
    assert kernel.spill_bytes == 0
    assert kernel.wgmma > 0 and kernel.tma > 0
    clean, masked = (loop.per_score(ROWS * KEYS // 128) for loop in kernel.softmax_loops)  # of a warpgroup's thread
    assert clean <= 7.5 and masked <= 11
    for name in ("q", "k", "v"):
        assert not weight_copies(compiled.hlo, name)
    assert compiled.temp_bytes <= 1.01 * tensor.size * 2  # text rows of one tile are put right in place


@pytest.mark.aot
@pytest.mark.parametrize("over", ["heads", "batch"])
@pytest.mark.parametrize("implementation", ["triton", "mosaic", "jax_triton"])
def test_two_gpus_share_heads_or_batch_without_collectives(implementation, over):
    """Mosaic's interpret mode holds one device at a time: tests/kernels/test_arrow_transforms.py shares the others."""
    mesh = aot.target("h200", devices=2).mesh
    tokens, heads = (P(None, None, "device"), P("device")) if over == "heads" else (P("device"), P())
    tensor = jax.ShapeDtypeStruct((2, SD3.length, HEADS, 64), jnp.bfloat16, sharding=NamedSharding(mesh, tokens))
    window = jax.ShapeDtypeStruct((HEADS,), jnp.int32, sharding=NamedSharding(mesh, heads))

    def attend(q, k, v, window, cache):
        return arrow_attention(q, k, v, window, layout=SD3, cache=cache, implementation=implementation)

    specs = tokens, tokens, tokens, heads, tokens
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    with jax.set_mesh(mesh):
        compiled = jax.jit(sharded, donate_argnums=4).lower(tensor, tensor, tensor, window, tensor).compile()
    assert not re.search(r" (all-|collective-|reduce-scatter)[\w-]*\(", compiled.as_text())
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == tensor.size  # of one GPU: half, of 2 bytes each


@pytest.mark.aot
@pytest.mark.parametrize("before", [None, "elsewhere"])
def test_where_mosaic_dumps_is_put_back(before, monkeypatch):
    monkeypatch.delenv("MOSAIC_GPU_DUMP_TO", raising=False)
    if before:
        monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", before)
    target = aot.target("h200")
    aot.kernels(target, jax.jit(lambda x: x + 1), target.abstract(jax.ShapeDtypeStruct((8,), jnp.float32)))
    assert os.environ.get("MOSAIC_GPU_DUMP_TO") == before


@pytest.mark.aot
@pytest.mark.parametrize("gpu", aot.targets())
@pytest.mark.parametrize(
    ("layout", "head_dim", "dtype", "layers"),
    [(SD3, 64, jnp.bfloat16, None), (FLUX, 128, jnp.float16, 3), (FLUX, 128, jnp.float32, None)],
)
def test_jax_triton_arrows_spill_nothing_and_copy_nothing(gpu, layout, head_dim, dtype, layers):
    target, compiled, kernels = compiled_arrow(gpu, layout, head_dim, dtype, layers, "jax_triton")
    (kernel,) = (kernel for kernel in kernels if kernel.name == "_arrow_attention")
    assert kernel.warps == TABLE[gpu, head_dim, jnp.dtype(dtype).itemsize].warps
    for name in ("q", "k", "v", "cache"):
        assert not weight_copies(compiled.hlo, name)
    assert compiled.alias_bytes == compiled.output_bytes  # the cache's buffer
    assert kernel.spill_bytes == 0
    assert kernel.cp_async > 0, "loads do not run ahead"
    assert aot.blocks_per_sm(kernel, target) >= 1
    expected = (False, False) if dtype == jnp.float32 else (gpu == "h200", gpu == "a100")  # IEEE, not TF32
    assert (kernel.wgmma > 0, kernel.mma > 0) == expected
    assert "ex2.approx.ftz.f32" in kernel.ptx
