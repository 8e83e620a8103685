"""Draws how the wings of the package import each other: docs/architecture.png.

python -m benchmarks.wings [--out FILE]
"""

import argparse
import ast
from collections import Counter
from pathlib import Path

from dfa2_jax.io.atomic import replacing

ROOT = Path(__file__).parent.parent
FLOORS = (
    {"cli": 0.5},
    {"commands": 0.5},
    {"report": 0.25, "conversion": 0.85},
    {"calibration": 0.4},
    {"pipeline": 0.55},
    {"families": 0.7},
    {"sampling": 0.2, "encoders": 0.55, "vae": 0.85},
    {"nn": 0.35, "plan": 0.05},
    {"weights": 0.7},
    {"pallas_kernels": 0.2},
)
"""From the roof down, and where on its floor a wing stands. `options` and `io`, which all import, are left out."""


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
        name: (x, 1 - (level + 0.5) / len(FLOORS)) for level, floor in enumerate(FLOORS) for name, x in floor.items()
    }
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (above, below), count in sorted(edges().items()):
        if above != below and above in places and below in places:
            (x0, y0), (x1, y1) = places[above], places[below]
            bend = 0.08 if abs(y0 - y1) > 1.5 / len(FLOORS) else 0.0
            style = {"arrowstyle": "-|>", "color": "#5b7a9d", "alpha": 0.6, "linewidth": 0.6 + 0.15 * min(count, 12)}
            style |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 16, "shrinkB": 16}
            axes.annotate("", xy=(x1, y1), xytext=(x0, y0), arrowprops=style)
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#f3efe6", "edgecolor": "#5b7a9d"}
    for name, (x, y) in places.items():
        axes.text(x, y, name, ha="center", va="center", fontsize=11, bbox=box)
    axes.set_xlim(-0.05, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architecture.png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
