"""The picture of docs/video.md, from benchmarks/results/video_orders.json: what two orders of tokens keep, and which
heads take which.

python -m benchmarks.video_orders_picture [--results FILE] [--out docs/video-orders.png]
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dfa2_jax.io.atomic import replacing
from toy.video_model import HEADS, LAYERS

COLOURS = {
    "native": "#2a7f9d",
    "time": "#c2352b",
    "both": "#20124d",
    "native, reuse": "#8fc1d1",
    "both, reuse": "#9a86c9",
}
METHODS = {
    "f": ("in full", "#20124d"),
    "n": ("arrow, frame by frame", "#2a7f9d"),
    "t": ("arrow over time", "#e07b00"),
    "c": ("reused", "#e6e6e6"),
}


def draw_curve(axes: Any, content: dict[str, Any], metric: str, label: str) -> None:
    rows = content["rows"]
    for kind, colour in COLOURS.items():
        points = sorted((row["density"], mean(row[metric])) for row in rows if row["kind"] == kind)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=kind, markersize=4)
    axes.axhline(mean(content["floor"][metric]), color="gray", linestyle=":", label="another seed")
    axes.set(xlabel="share of query-key pairs computed", ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)


def draw_heads(axes: Any, row: dict[str, Any]) -> None:
    """Every head of every layer, from top to bottom, at every step."""
    letters = list(METHODS)
    picture = np.array([[letters.index(letter) for letter in step] for step in row["steps"]]).T
    colours = ListedColormap([colour for _, colour in METHODS.values()])
    axes.imshow(picture, colours, aspect="auto", interpolation="nearest", vmin=-0.5, vmax=len(letters) - 0.5)
    for layer in range(1, LAYERS):
        axes.axhline(layer * HEADS - 0.5, color="white", linewidth=1.5)
    axes.set_yticks([layer * HEADS + (HEADS - 1) / 2 for layer in range(LAYERS)], range(LAYERS))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=f"{row['kind']}, {row['density']:.2f} kept", xlabel="step", ylabel="layer, and its heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/video_orders.json"))
    parser.add_argument("--delta", type=float, default=0.4, help="of the plans whose heads are shown")
    parser.add_argument("--out", type=Path, default=Path("docs/video-orders.png"))
    args = parser.parse_args()
    content = json.loads(args.results.read_text())
    rows = content["rows"]
    figure = Figure(figsize=(11, 8), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    (left, right), (two, reused) = figure.subplots(2, 2)
    draw_curve(left, content, "psnr", "PSNR to the dense video, dB")
    draw_curve(right, content, "ssim", "SSIM to the dense video")
    left.legend(fontsize=8, frameon=False)
    for axes, kind in ((two, "both"), (reused, "both, reuse")):
        draw_heads(axes, next(row for row in rows if (row["kind"], row["delta"]) == (kind, args.delta)))
    shown = [Patch(facecolor=colour, label=name) for name, colour in METHODS.values()]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), fontsize=8, frameon=False)
    with replacing(args.out) as file:
        figure.savefig(file, format=args.out.suffix[1:])
    print(args.out)


if __name__ == "__main__":
    main()
