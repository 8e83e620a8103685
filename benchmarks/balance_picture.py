"""The picture of benchmarks/results/balance.json: how long the slowest device's attention takes, by dealing of heads.

python -m benchmarks.balance_picture [--out docs/balance.png]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dfa2_jax.io.atomic import replacing

RESULTS = Path(__file__).parent / "results"
DEALINGS = {
    "contiguous": ("the model's order, for good", "#c2352b", "o-"),
    "fixed": ("by cost over all steps, for good", "#e07b00", "s--"),
    "anew": ("by cost at each step and layer", "#20124d", "o-"),
    "bound": ("lower bound", "#9a9a9a", ":"),
}
PLANS = {"mixed": "arrows and caching", "reuse": "caching alone", "arrows": "arrows alone"}


def panel(axes: Any, found: dict[str, dict[str, float]]) -> None:
    places = range(len(found))
    for dealing, (label, colour, style) in DEALINGS.items():
        values = [one[dealing] for one in found.values()]
        axes.plot(places, values, style, color=colour, label=label, markersize=4.5, linewidth=1.6)
        if dealing in ("contiguous", "anew"):
            for place, value in zip(places, values, strict=True):
                offset = (-3, 7) if dealing == "contiguous" else (0, -13)
                look = {"ha": "center", "fontsize": 8, "color": colour}
                behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.3} if dealing == "anew" else None
                axes.annotate(f"{value:.2f}", (place, value), offset, textcoords="offset points", bbox=behind, **look)
    axes.set_xticks(places, [*found])
    axes.set(xlim=(-0.3, len(found) - 0.7), ylim=(0.85, 2.4))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/balance.png"))
    args = parser.parse_args()
    data = json.loads((RESULTS / "balance.json").read_text())
    figure = Figure(figsize=(10, 6.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(data["rows"]), len(PLANS), sharex=True, sharey=True)
    for line, (name, kinds) in zip(grid, data["rows"].items(), strict=True):
        for axes, (kind, title) in zip(line, PLANS.items(), strict=True):
            panel(axes, kinds[kind])
            axes.set_title(f"{name} px, {title}", fontsize=9)
        line[0].set_ylabel("slowest device / mean", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("devices of a row", fontsize=9)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    figure.suptitle(f"Tiles of attention by random plans that keep {data['keep']} of all pairs", fontsize=10)
    with replacing(args.out) as file:
        figure.savefig(file, format=args.out.suffix[1:])
    print(args.out)


if __name__ == "__main__":
    main()
