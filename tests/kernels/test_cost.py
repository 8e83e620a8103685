"""The cost model against what was measured and compiled, and the paper's roofline."""

import json

import numpy as np
import pytest
from checkout import ROOT

from pallas_kernels import FULL, Layout, cost
from pallas_kernels.backends.triton.tiles import TABLE, Tiles

RESULTS = ROOT / "benchmarks" / "results"
HEADS = 24
SHAPES = {
    "FLUX 1K": (1, 128, Layout(512, 4096, True)),
    "FLUX 2K": (1, 128, Layout(512, 16384, True)),
    "SD3 1K": (2, 64, Layout(333, 4096, False)),
    "SD3 2K": (1, 64, Layout(333, 16384, False)),
}
pytestmark = pytest.mark.checkout  # reads committed measurements


def measured(name, shape):
    shapes = json.loads((RESULTS / name).read_text())["shapes"]
    return next(entry["milliseconds"] for entry in shapes if entry["shape"] == shape)


def compiled():
    for kernel in json.loads((RESULTS / "aot.json").read_text())["kernels"]:
        if kernel["kernel"] == "arrow" and kernel["dtype"] == "bfloat16" and not kernel["spill_bytes"]:
            loops = kernel["instructions_per_score"]
            code = cost.Code(kernel["blocks_per_sm"], loops[0], loops[-1])
            yield kernel["gpu"], kernel["head_dim"], Tiles(*kernel["tiles"]), code


def windows(layout):
    visual = layout.num_visual
    mixed = [(FULL, visual // 8, visual // 32)[3 * head // HEADS] for head in range(HEADS)]
    rows = {"full": [FULL] * HEADS, "V/16": [visual // 16] * HEADS, "V/64": [visual // 64] * HEADS, "mixed": mixed}
    return {name: np.array(row) for name, row in rows.items()}


def test_predictions_are_what_an_h200_took():
    """All 88 timings of 6 tiles, from full heads to V/64."""
    logs = []
    for gpu, head_dim, tiles, code in compiled():
        for name, (batch, dim, layout) in SHAPES.items():
            if gpu != "h200" or dim != head_dim:
                continue
            times = measured("tiles_h200.json", name)
            label = f"({tiles.rows}, {tiles.keys}, {tiles.warps}, {tiles.stages})"
            if f"{label} full" not in times:
                continue
            for row, half_window in windows(layout).items():
                predicted = cost.arrow_seconds(gpu, head_dim, layout, half_window, batch, tiles=tiles, code=code)
                logs.append(np.log(predicted / (1e-3 * times[f"{label} {row}"])))
    assert len(logs) == 88
    assert np.sqrt(np.mean(np.square(logs))) < 0.05 and np.abs(logs).max() < 0.15


@pytest.mark.parametrize("shape", SHAPES)
def test_nested_and_dense_calls_too(shape):
    """The nested kernel was not fitted: its ladder is V/64, V/32, V/16, V/8."""
    batch, head_dim, layout = SHAPES[shape]
    times = measured("attention_gpu.json", shape)
    ladder = layout.num_visual // np.array([64, 32, 16, 8])
    nested = cost.nested_seconds("h200", head_dim, layout, ladder, HEADS, batch)
    dense = cost.dense_seconds("h200", head_dim, layout, HEADS, batch)
    assert 1e3 * nested == pytest.approx(times["nested"], rel=0.1)
    assert 1e3 * dense == pytest.approx(times["dense"], rel=0.06)


@pytest.mark.parametrize("gpu", cost.GPUS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_shipped_tile_is_the_fastest_by_the_model(gpu, head_dim):
    """Geometric mean over sizes and rows."""
    scores = {}
    for name, dim, tiles, code in compiled():
        if (name, dim) != (gpu, head_dim):
            continue
        seconds = [
            cost.arrow_seconds(gpu, dim, layout, row, batch, tiles=tiles, code=code)
            for batch, shape_dim, layout in SHAPES.values()
            if shape_dim == dim
            for row in windows(layout).values()
        ]
        scores[tiles] = np.exp(np.mean(np.log(seconds)))
    assert len(scores) >= 4
    assert min(scores, key=scores.__getitem__) == TABLE[gpu, head_dim, 2]


def test_the_papers_claim_holds_for_one_a100_and_one_block_size():
    """Memory bound only for r >= 0.95 (appendix): 128 query rows, the A100 of 40 GB, FLUX at 2048 px."""
    flops, length = 312e12, 16384 + 512
    assert cost.memory_bound_from(length, 128, flops, 1.555e12) == pytest.approx(0.945, abs=1e-3)
    assert cost.memory_bound_from(length, 128, flops, 2.039e12) == pytest.approx(0.977, abs=1e-3)  # 80 GB
    assert cost.memory_bound_from(length, 64, flops, 1.555e12) == 0  # by the formula: always
    for block_rows, bandwidth in ((128, 1.555e12), (256, 2.039e12)):
        edge = cost.memory_bound_from(length, block_rows, flops, bandwidth)
        assert cost.intensity(length, edge, block_rows) == pytest.approx(flops / bandwidth)
        assert cost.intensity(length, edge - 0.01, block_rows) > flops / bandwidth


def test_intensity_counts_operations_over_bytes():
    """One head of 1,000 queries in blocks of 100, of 64 numbers, half of the scores kept."""
    length, rows, dim, kept = 1000, 100, 64, 500
    operations = 4 * length * kept * dim
    numbers = 2 * length * dim + length // rows * kept * dim  # queries and outputs; a block's keys
    assert cost.intensity(length, 0.5, rows) == pytest.approx(operations / (2 * numbers))
