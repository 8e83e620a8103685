"""Draws how the wings of the package import each other: docs/architecture.png.

python -m benchmarks.wings [--out FILE]
"""

import argparse
import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("cli",),
    ("report", "conversion"),
    ("calibration",),
    ("pipeline",),
    ("families",),
    ("sampling", "encoders", "vae"),
    ("nn", "plan", "options"),
    ("weights",),
    ("io", "pallas_kernels"),
)
"""From the roof down."""


def wing(module: str) -> str:
    package, *rest = module.split(".")
    return "pallas_kernels" if package == "pallas_kernels" else rest[0] if rest else "public names"


def edges() -> Counter[tuple[str, str]]:
    """Imports from wing to wing, by number of importing statements."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in (ROOT / "dfa2_jax").rglob("*.py"):
        here = wing(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("dfa2_jax.", "pallas_kernels")):
                counts[here, wing(node.module or "")] += 1
    return counts


def draw(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = {
        name: ((i + 1) / (len(floor) + 1), 1 - (level + 0.5) / len(FLOORS))
        for level, floor in enumerate(FLOORS)
        for i, name in enumerate(floor)
    }
    figure = Figure(figsize=(8, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (above, below), count in sorted(edges().items()):
        if above != below and above in places and below in places:
            (x0, y0), (x1, y1) = places[above], places[below]
            bend = 0.12 if abs(y0 - y1) > 1.5 / len(FLOORS) else 0.0
            style = {"arrowstyle": "-|>", "color": "#5b7a9d", "alpha": 0.6, "linewidth": 0.6 + 0.15 * min(count, 12)}
            style |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 16, "shrinkB": 16}
            axes.annotate("", xy=(x1, y1), xytext=(x0, y0), arrowprops=style)
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#f3efe6", "edgecolor": "#5b7a9d"}
    for name, (x, y) in places.items():
        axes.text(x, y, name, ha="center", va="center", fontsize=11, bbox=box)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architecture.png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
