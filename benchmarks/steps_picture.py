"""The picture of docs/steps.md, from benchmarks/results/steps_*.json: PSNR against dense and against converged images.

python -m benchmarks.steps_picture [--out docs/steps.png]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dfa2_jax.io.atomic import replacing

RESULTS = Path(__file__).parent / "results"
KINDS = {
    "steps": ("step plan", "#20124d"),
    "steps to the limit": ("step plan to the limit", "#2a9d8f"),
    "steps, resolved": ("step plan, without a run of its own", "#7a68b0"),
    "fewer Euler steps": ("Euler's steps", "#c2352b"),
    "DPM++ 2M": ("DPM++ 2M", "#d18ca0"),
    "heads, weighed": ("heads by what errors do, as if attention were all", "#e07b00"),
    "heads": ("heads by the paper's delta, likewise", "#f4c27a"),
}


def points(name: str, kind: str, against: str) -> list[tuple[float, float]]:
    """Speedup and mean PSNR, from a result file. The dense run is Euler's steps."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    kinds = [kind, "dense"] if kind == "fewer Euler steps" and against == "converged" else [kind]
    chosen = [row for row in rows if row["kind"] in kinds]
    return sorted((1 / row["cost"], mean(seed["psnr"] for seed in row[f"against_{against}"])) for row in chosen)


def panel(axes: Any, against: str, names: Sequence[str]) -> None:
    """One reference: lines are of 20 steps, marks of 28 and 50."""
    for kind in names:
        label, colour = KINDS[kind]
        file = "heads_20" if kind.startswith("heads") else "steps_20"
        axes.plot(*zip(*points(file, kind, against), strict=True), "o-", color=colour, label=label, markersize=4)
        for steps, marker in (("steps_28", "s"), ("steps_50", "^")):
            if others := points(steps, kind, against) if kind != "steps, resolved" else []:
                axes.plot(*zip(*others, strict=True), marker, color=colour, markersize=7, fillstyle="none")
    axes.set(xlabel="speedup of the network's time", ylabel=f"PSNR against the {against} image, dB")
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/steps.png"))
    args = parser.parse_args()
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    panel(left, "dense", [kind for kind in KINDS if kind != "steps to the limit"])
    panel(right, "converged", ["steps to the limit", "steps", "fewer Euler steps", "DPM++ 2M"])
    figure.suptitle("20 steps; squares: 28 steps; triangles: 50 steps", fontsize=9)
    with replacing(args.out) as file:
        figure.savefig(file, format=args.out.suffix[1:])
    print(args.out)


if __name__ == "__main__":
    main()
