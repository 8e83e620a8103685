"""The paper's ablations on any folder: coefficient c (appendix, table 5) and sets of methods, quality against density.

    python -m benchmarks.ablations FOLDER --prompts FILE [--calibrate-on 8] [--steps 20] [--height PX] [--width PX]
        [--deltas 0.2 0.4 0.6 0.8 1.0] [--points ROW=THRESHOLD ...] [--out PREFIX] ...

One prompt per line: the first ones calibrate, the others are sampled, dense and compressed, from equal seeds. Quality
is SSIM and PSNR against the dense images. Every point goes to PREFIX.json, the curves of quality over density to
PREFIX.png. A run that was stopped goes on from the points in PREFIX.json. Thresholds of schemes that decide by layers
are another quantity than delta. They are swept until their densities span those of the plans. Tables compare at equal
density, between neighbours by a straight line.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

from benchmarks.machine import describe_machine
from dfa2_jax import Pipeline, calibrate
from dfa2_jax.calibration.baselines import SCHEMES, calibrate_scheme, sample_scheme
from dfa2_jax.io.atomic import replacing, write_whole

COEFFICIENTS = {"c none": None, "c 1": 1.0, "c 1.5": 1.5, "c 2": 2.0}
ARROWS = "arrows only"
THRESHOLDS = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Thresholds of DiTFastAttn's kind; the paper's are up to 0.15."""

Run = Callable[[float], tuple[float, np.ndarray]]
"""From a delta or threshold to a density, and the images of the prompts."""


def runs(
    pipeline: Pipeline, learn: list[str], test: list[str], shape: dict[str, Any], tiles: tuple[int, int] | None
) -> dict[str, Run]:
    """Every row of both tables, by name."""
    sampling = shape | {"prompt": test, "seed": 1, "output_type": "np"}

    def planned(threshold: float, **options: Any) -> tuple[float, np.ndarray]:
        plan = calibrate(pipeline, learn, delta=threshold, tiles=tiles, progress=False, **shape, **options)
        return plan.density(), pipeline(**sampling, plan=plan, progress=False).images

    def shared(threshold: float, scheme: Any) -> tuple[float, np.ndarray]:
        found = calibrate_scheme(pipeline, scheme, threshold, progress=False, prompt=learn, **shape)
        return found.density(), sample_scheme(pipeline, found, **sampling)

    tables: dict[str, Run] = {name: partial(planned, c=c) for name, c in COEFFICIENTS.items()}
    tables[ARROWS] = partial(planned, cache=False)
    return tables | {name: partial(shared, scheme=scheme) for name, scheme in SCHEMES.items()}


def quality(images: np.ndarray, exact: np.ndarray) -> dict[str, list[float]]:
    pairs = list(zip(images, exact, strict=True))
    ssim = [structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in pairs]
    psnr = [peak_signal_noise_ratio(b, a, data_range=1.0) if not np.array_equal(a, b) else np.inf for a, b in pairs]
    return {"ssim": [float(x) for x in ssim], "psnr": [float(min(x, 100.0)) for x in psnr]}


def wins(point: dict[str, Any], other: dict[str, Any]) -> float:
    """Share of the prompts that one keeps better than the other; half of those that are equal."""
    pairs = list(zip(point["ssim"], other["ssim"], strict=True))
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def at_density(points: list[dict[str, Any]], density: float, metric: str) -> float | None:
    """By a straight line between the neighbours; None outside of what was swept."""
    found = sorted((point["density"], float(np.mean(point[metric]))) for point in points)
    x, y = np.array(found).T
    return float(np.interp(density, x, y)) if x[0] <= density <= x[-1] else None


def earlier_points(path: Path, facts: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The points of a run that was stopped, if that run was made from the same facts."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    rows, wanted = content.pop("rows"), json.loads(json.dumps(facts))
    if differ := [name for name in wanted if name != "machine" and content.get(name) != wanted[name]]:
        raise SystemExit(f"{path} holds points of a run with other {differ}: move it, or choose another --out.")
    return rows


def draw(result: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, points) in enumerate(result.items()):
        axes = left if name in COEFFICIENTS else right
        for one in (axes, right) if name == "c 1.5" else (axes,):
            label = "arrows, caching (default)" if one is right and name == "c 1.5" else name
            ordered = sorted(points, key=lambda point: point["density"])
            one.plot(
                [p["density"] for p in ordered], [np.mean(p["ssim"]) for p in ordered], f"C{number}o-", label=label
            )
    for axes, title in ((left, "bound of a head, c"), (right, "methods")):
        axes.set(xlabel="share of query-key pairs computed", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel("SSIM against the dense image")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--calibrate-on", type=int, default=8, metavar="N")
    parser.add_argument("--sample-on", type=int, metavar="N", help="of the other prompts; default: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--max-sequence-length", type=int, metavar="TOKENS", help="of T5")
    parser.add_argument("--tiles", type=int, nargs=2, metavar=("QUERIES", "KEYS"), help="small images: 16 16")
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--points", nargs="+", metavar="ROW=THRESHOLD", help="these alone, such as 'arrows only=0.4'")
    parser.add_argument("--dtype", help="default: the checkpoint's; float32 on CPU")
    parser.add_argument("--out", type=Path, default=Path("build/ablations"), metavar="PREFIX")
    args = parser.parse_args()
    prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()]
    args.learn, args.test = prompts[: args.calibrate_on], prompts[args.calibrate_on :][: args.sample_on]
    if not args.test:
        parser.error(
            f"{args.prompts} has {len(prompts)} prompts: more than --calibrate-on {args.calibrate_on} are needed"
        )
    known = [*COEFFICIENTS, ARROWS, *SCHEMES]
    args.chosen = []
    for one in args.points or []:
        name, _, threshold = one.rpartition("=")
        if name not in known:
            parser.error(f"--points {one!r}: rows are {known}")
        args.chosen.append((name, float(threshold)))
    return args


def main() -> None:
    args = parse()
    learn, test = args.learn, args.test
    pipeline = Pipeline.from_pretrained(args.folder, dtype=args.dtype)
    shape = {"height": args.height, "width": args.width, "num_inference_steps": args.steps}
    shape |= {"max_sequence_length": args.max_sequence_length, "guidance_scale": args.guidance_scale}
    facts = {
        "machine": describe_machine(),
        "device": jax.devices()[0].device_kind,
        "folder": Path(args.folder).name,
        "fingerprint": pipeline.fingerprint,
        "dtype": pipeline.dtype.name,
        "learn": learn,
        "test": test,
        "arguments": {k: str(v) for k, v in (shape | {"tiles": args.tiles}).items()},
    }
    path = args.out.with_suffix(".json")
    result = earlier_points(path, facts)
    exact = pipeline(test, seed=1, output_type="np", progress=False, **shape).images
    rows = runs(pipeline, learn, test, shape, args.tiles and tuple(args.tiles))
    by_delta = {*COEFFICIENTS, ARROWS, *(name for name, scheme in SCHEMES.items() if scheme.per_head)}
    todo: list[tuple[str, float]] = args.chosen
    todo = todo or [(name, x) for name in rows for x in (args.deltas if name in by_delta else THRESHOLDS)]
    for name, threshold in tqdm(todo):
        points = result.setdefault(name, [])
        if any(point["threshold"] == threshold for point in points):
            continue
        density, images = rows[name](threshold)
        points.append({"threshold": threshold, "density": density} | quality(images, exact))
        tqdm.write(f"{name} {threshold}: density {density:.3f}, SSIM {np.mean(points[-1]['ssim']):.4f}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(facts | {"rows": result}, indent=1) + "\n")
    draw(result, args.out.with_suffix(".png"))
    compare(result)


def compare(result: dict[str, list[dict[str, Any]]]) -> None:
    """Print the default plans' SSIM next to the others' at their density, and to points that keep no fewer pairs."""
    for point in result.get("c 1.5", []):
        matched = {name: at_density(points, point["density"], "ssim") for name, points in result.items()}
        shown = ", ".join(f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in matched.items())
        print(f"density {point['density']:.3f}: SSIM {shown}")
        for name, points in result.items():
            for other in points:
                if name not in COEFFICIENTS and other["density"] >= point["density"]:
                    better = f"better than {name} at {other['density']:.3f} in {wins(point, other):.0%} of the prompts"
                    print(f"  {better} (SSIM {np.mean(other['ssim']):.4f})")


if __name__ == "__main__":
    main()
