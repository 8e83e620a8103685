"""The picture of docs/steps.md: PSNR against speedup, from benchmarks/results/steps_*.json.

python -m benchmarks.steps_picture [--out docs/steps.png]
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "steps": "step plan",
    "steps, resolved": "step plan, without a run of its own",
    "fewer Euler steps": "fewer Euler steps",
    "heads": "heads, delta 0.1, as if attention were all",
}


def points(name: str, kind: str) -> list[tuple[float, float]]:
    rows = json.loads((RESULTS / f"steps_{name}.json").read_text())["rows"]
    chosen = [row for row in rows if row["kind"] == kind]
    return sorted((1 / row["cost"], mean(seed["psnr"] for seed in row["against_dense"])) for row in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/steps.png"))
    args = parser.parse_args()
    figure = Figure(figsize=(7.5, 5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = dict(zip(NAMES, ("#20124d", "#7a68b0", "#c2352b", "#f4a259"), strict=True))
    for kind, label in NAMES.items():
        file = "heads" if kind == "heads" else "20"
        axes.plot(*zip(*points(file, kind), strict=True), "o-", color=colours[kind], label=f"{label}, 20 steps")
    for steps, marker in (("28", "s"), ("50", "^")):
        for kind in ("steps", "fewer Euler steps"):
            label = f"{NAMES[kind]}, {steps} steps"
            axes.plot(*zip(*points(steps, kind), strict=True), marker, color=colours[kind], label=label, markersize=7)
    axes.axhline(37, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="speedup of the network's time", ylabel="PSNR against the dense image, dB")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
