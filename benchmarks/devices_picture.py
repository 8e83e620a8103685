"""The picture of docs/devices.md: what each of four devices holds, two rows of the batch x two shares of the tokens.

python -m benchmarks.devices_picture [--out docs/devices.png]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dfa2_jax.io.atomic import replacing

TEXT, VISUAL, WHOLE, OTHERS = "#e07b00", "#20124d", "#2a9d8f", "#efefef"
SEQUENCE = ((0.0, 0.3, TEXT), (0.3, 1.0, VISUAL))
"""Where text and visual tokens begin and end, and their colours."""

HEADS = 6
HANDS = (0, 3), (1, 5)
"""Heads of each device in this step; nobody has the others, which are cached."""

Cell = Callable[[Any, int, int], None]


def block(axes: Any, x: tuple[float, float], y: float, height: float, colour: str, edge: str = "white") -> None:
    axes.add_patch(Rectangle((x[0], y), x[1] - x[0], height, facecolor=colour, edgecolor=edge, linewidth=1.2))


def line(axes: Any, y: float, height: float, share: int | None) -> None:
    """The tokens of one line: those of a share, or all, in colour."""
    for start, stop, colour in SEQUENCE:
        for part in range(2):
            width = (stop - start) / 2
            ends = start + part * width, start + (part + 1) * width
            block(axes, ends, y, height, colour if share in (None, part) else OTHERS)


def whole(axes: Any, row: int, share: int) -> None:
    block(axes, (0, 1), 0.12, 0.76, WHOLE)
    axes.text(0.5, 0.5, "whole", color="white", ha="center", va="center", fontsize=9)


def tokens(axes: Any, row: int, share: int) -> None:
    for one in range(2):
        line(axes, 0.54 - 0.48 * one, 0.4, share if one == row else -1)


def heads(axes: Any, row: int, share: int) -> None:
    for head in range(HEADS):
        line(axes, 1 - (head + 1) / HEADS, 1 / HEADS, None if head in HANDS[share] else -1)


def memory(axes: Any, row: int, share: int) -> None:
    for head in range(HEADS):
        line(axes, 1 - (head + 1) / HEADS, 1 / HEADS, share)


BATCH = [f"row {row}" for row in range(2)]
NUMBERS = [f"head {head}" for head in range(HEADS)]
LINES: dict[str, tuple[str, Cell, float, list[str]]] = {
    "weights, latents": ("the same on every device", whole, 0.7, []),
    "blocks": ("own row of the batch,\nown text and visual tokens", tokens, 1.0, BATCH),
    "attention": ("own heads, all tokens of the row;\n2 and 4 are cached at this step", heads, 1.3, NUMBERS),
    "memory": ("outputs of all heads,\nwhere their tokens are", memory, 1.3, NUMBERS),
}
EXCHANGES = {1: "exchange of q, k, v: tokens for heads", 2: "exchange of outputs: heads for tokens"}
"""After which line the devices of a row exchange what."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/devices.png"))
    args = parser.parse_args()
    figure = Figure(figsize=(10, 5.8), dpi=110)
    FigureCanvasAgg(figure)
    heights = [height for _, _, height, _ in LINES.values()]
    place = {"left": 0.285, "right": 0.985, "top": 0.91, "bottom": 0.07, "hspace": 0.5, "wspace": 0.14}
    grid = figure.subplots(len(LINES), 4, gridspec_kw=place | {"height_ratios": heights})
    for axes_of_line, (name, (told, cell, _, labels)) in zip(grid, LINES.items(), strict=True):
        for device, axes in enumerate(axes_of_line):
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            cell(axes, device // 2, device % 2)
        ticks = [1 - (number + 0.5) / len(labels) for number in range(len(labels))]
        axes_of_line[0].set_yticks(ticks, labels, fontsize=7, color="#444444")
        axes_of_line[0].tick_params(length=0, pad=2)
        box = axes_of_line[0].get_position()
        middle = (box.y0 + box.y1) / 2
        figure.text(0.015, middle + 0.012, name, fontsize=11, weight="bold", va="bottom")
        figure.text(0.015, middle + 0.004, told, fontsize=8.5, va="top", color="#444444")
    for device, axes in enumerate(grid[0]):
        axes.set_title(f"device {device}\nrow {device // 2}, share {device % 2}", fontsize=9)
    for number, told in EXCHANGES.items():
        for left in (0, 2):
            above, below = grid[number][left].get_position(), grid[number + 1][left + 1].get_position()
            middle = (above.x0 + below.x1) / 2, (above.y0 + below.y1) / 2
            figure.text(*middle, f"↓ {told} ↓", ha="center", va="center", fontsize=8.5, color="#c2352b")
    legend = [Rectangle((0, 0), 1, 1, facecolor=colour) for colour in (TEXT, VISUAL, OTHERS)]
    names = ["text tokens", "visual tokens", "not on this device"]
    figure.legend(legend, names, loc="lower center", ncols=3, frameon=False, fontsize=9, bbox_to_anchor=(0.63, 0))
    with replacing(args.out) as file:
        figure.savefig(file, format=args.out.suffix[1:])
    print(args.out)


if __name__ == "__main__":
    main()
