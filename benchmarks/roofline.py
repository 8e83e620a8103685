"""The paper's roofline, and the cost model against what an H200 took: `python -m benchmarks.roofline [--out FILE]`.

Left: intensity of block-sparse attention by the paper's formula at FLUX 2048 px, against what two A100s need to be
busy. Right: `pallas_kernels.cost` against benchmarks/results/tiles_h200.json and attention_gpu.json.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dfa2_jax.io.atomic import replacing
from pallas_kernels import FULL, Layout, cost

RESULTS = Path(__file__).parent / "results"
LENGTH = 16384 + 512
HEADS = 24
A100S = {"A100 40 GB": 1.555e12, "A100 80 GB": 2.039e12}
SHAPES = {
    "FLUX 1K": (1, 128, Layout(512, 4096, True)),
    "FLUX 2K": (1, 128, Layout(512, 16384, True)),
    "SD3 1K": (2, 64, Layout(333, 4096, False)),
    "SD3 2K": (1, 64, Layout(333, 16384, False)),
}


def draw_intensity(axes: plt.Axes) -> None:
    sparsity = np.linspace(0, 0.995, 200)
    for rows in (64, 128):
        values = [cost.intensity(LENGTH, r, rows) for r in sparsity]
        axes.plot(sparsity, values, label=f"blocks of {rows} queries")
    for (name, bandwidth), style in zip(A100S.items(), ("--", ":"), strict=True):
        ridge = 312e12 / bandwidth
        start = cost.memory_bound_from(LENGTH, 128, 312e12, bandwidth)
        axes.axhline(ridge, color="grey", linestyle=style, label=f"{name}: memory bound below {ridge:.0f}")
        axes.plot(start, ridge, "ko")
        axes.annotate(f"r = {start:.3f}", (start, ridge), (-60, -14), textcoords="offset points")
    axes.set(
        xlabel="sparsity r", ylabel="operations per byte", ylim=(0, 280), title="The paper's formula, FLUX 2048 px"
    )
    axes.legend(loc="lower left", fontsize=8)


def points() -> list[tuple[str, float, float]]:
    """(kind, predicted, measured) in milliseconds, of what is shipped."""
    pairs = []
    for entry in json.loads((RESULTS / "attention_gpu.json").read_text())["shapes"]:
        batch, head_dim, layout = SHAPES[entry["shape"]]
        visual, times = layout.num_visual, entry["milliseconds"]
        for name, parts in (("full", None), ("V/16", 16), ("V/32", 32), ("V/64", 64)):
            window = np.full(HEADS, FULL if parts is None else visual // parts)
            pairs.append(
                ("arrows", cost.arrow_seconds("h200", head_dim, layout, window, batch), times[f"arrow {name}"])
            )
        ladder = visual // np.array([64, 32, 16, 8])
        pairs.append(("nested", cost.nested_seconds("h200", head_dim, layout, ladder, HEADS, batch), times["nested"]))
        pairs.append(("dense (cuDNN)", cost.dense_seconds("h200", head_dim, layout, HEADS, batch), times["dense"]))
    return [(kind, 1e3 * predicted, measured) for kind, predicted, measured in pairs]


def draw_predictions(axes: plt.Axes) -> None:
    for kind, marker in (("arrows", "o"), ("nested", "s"), ("dense (cuDNN)", "^")):
        here = [(measured, predicted) for name, predicted, measured in points() if name == kind]
        axes.loglog(*zip(*here, strict=True), marker, label=kind)
    ends = np.array([0.15, 10])
    axes.loglog(ends, ends, "k-", linewidth=0.8)
    axes.fill_between(ends, ends / 1.15, ends * 1.15, color="grey", alpha=0.2, label="15 %")
    axes.set(xlabel="measured ms, H200", ylabel="predicted ms", title="Cost model, 1024 and 2048 px")
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/roofline.png"))
    args = parser.parse_args()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_intensity(axes[0])
    draw_predictions(axes[1])
    with replacing(args.out) as file:
        figure.savefig(file, format=args.out.suffix[1:], dpi=110)


if __name__ == "__main__":
    main()
