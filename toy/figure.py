"""The demo's picture: the same prompts dense and by plans, and where they differ.

    python -m toy.figure --dense DIR --plan NAME=DIR ... --report report.json --out demo.png

Each DIR is what `dfa2 sample` wrote for the same prompts and seed; NAME is a plan's in the report of `dfa2 report`.
Densities and times come from there.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dfa2_jax.io.atomic import replacing
from dfa2_jax.io.images import read_metadata

AMPLIFIED = 4
"""A difference of a quarter of the range is white."""


def read(folder: Path) -> dict[str, np.ndarray]:
    """Images in [0, 1] by file name."""
    images = {path.name: np.asarray(Image.open(path), np.float32) / 255 for path in sorted(folder.glob("*.png"))}
    if not images:
        raise SystemExit(f"{folder} holds no PNG: it must be what `dfa2 sample --out` was given.")
    return images


def prompt_of(path: Path) -> str:
    """What `dfa2 sample` noted in the PNG."""
    return read_metadata(path)["prompt"]


def in_short(line: dict[str, Any]) -> str:
    """A line of a report's table."""
    time = f"{1e3 * line['seconds_per_step']['median']:.0f} ms a step"
    if line["kind"] == "dense":
        return f"every query-key pair\n{time}"
    psnr, ssim = (line["metrics"][name]["mean"] for name in ("psnr", "ssim"))
    metrics = f"mean PSNR {psnr:.1f}, SSIM {ssim:.2f}"
    return f"{line['density']['exact']:.0%} of the pairs, {metrics}\n{time}, {line['speedup']:.2f} times as fast"


def draw(dense: Path, plans: dict[str, Path], report: dict[str, Any], out: Path) -> None:
    lines = {line["name"]: line for line in report["rows"]}
    exact, others = read(dense), {name: read(folder) for name, folder in plans.items()}
    for name, images in others.items():
        if images.keys() != exact.keys():
            raise SystemExit(f"{plans[name]} holds {sorted(images)}, but {dense} {sorted(exact)}: sample both anew.")
    columns = 1 + 2 * len(plans)
    figure = Figure(figsize=(2.1 * columns, 2.15 * len(exact) + 0.9), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(exact), columns, squeeze=False)
    titles = [f"dense\n{in_short(lines['dense'])}"]
    for name in plans:
        titles += [f"{name}\n{in_short(lines[name])}", f"its difference from dense\ntimes {AMPLIFIED}\n"]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=7)
    for cells, (file, image) in zip(grid, exact.items(), strict=True):
        shown = [image]
        for images in others.values():
            shown += [images[file], np.clip(np.abs(images[file] - image) * AMPLIFIED, 0, 1)]
        for axes, pixels in zip(cells, shown, strict=True):
            axes.imshow(pixels)
            axes.set(xticks=[], yticks=[])
        cells[0].set_xlabel("\n".join(textwrap.wrap(prompt_of(dense / file), 40)), fontsize=7)
    made = report["arguments"]
    shape = (
        f"{made['width']} x {made['height']}, {made['num_inference_steps']} steps, guidance {made['guidance_scale']:g}"
    )
    figure.suptitle(f"{report['model']['folder']}, {shape}, on {report['machine']['cores']} cores", fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        figure.savefig(file, format=out.suffix[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, metavar="DIR")
    parser.add_argument("--plan", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plans = {name: Path(folder) for name, _, folder in (given.rpartition("=") for given in args.plan)}
    report = json.loads(args.report.read_text())
    known = [line["name"] for line in report["rows"] if line["kind"] == "plan"]
    if unknown := [name for name in plans if name not in known]:
        parser.error(f"--plan {unknown}: the plans of {args.report} are {known}, and each is NAME=DIR")
    draw(args.dense, plans, report, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
