"""What plans do to images, and the model in the box."""

from collections.abc import Iterator
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.page_tables.base import table


@table(
    "demo",
    "demo_report.json",
    "images | PSNR, dB: mean, worst | SSIM: mean, worst | kept pairs | speedup, predicted",
    "make demo-full",
)
def demo(data: Any) -> Iterator[list[str]]:
    for one in data["rows"]:
        if one["kind"] == "dense" or "left_out" in one:
            continue
        scores = [[one["metrics"][name][kind] for kind in ("mean", "worst")] for name in ("psnr", "ssim")]
        cells = [f"{scores[0][0]:.1f}, {scores[0][1]:.1f}", f"{scores[1][0]:.4f}, {scores[1][1]:.4f}"]
        if one["kind"] == "plan":
            cells += [f"{one['density']['exact']:.2f}", f"{one['speedup']:.2f}x, {one['predicted_speedup']:.2f}x"]
        name = f"plan, {one['name'].replace('-', ' ')}" if one["kind"] == "plan" else one["name"]
        yield [name, *cells, *[""] * (4 - len(cells))]


@table(
    "first-minute",
    "first_minute.json",
    "command | first image, s | end, s | load average at the start",
    "python -m benchmarks.first_minute",
)
def first_minute(data: Any) -> Iterator[list[str]]:
    names = {"make demo": "`make demo` in a clone", "dfa2 demo": "`dfa2 demo` from a wheel"}
    names["dfa2 demo, again"] = "the same, a second time"
    for name, one in data["rows"].items():
        seconds = one["seconds"]
        yield [
            names.get(name, f"`{name}`"),
            f"{seconds['first_image']:.0f}",
            f"{seconds['end']:.0f}",
            f"{one['load_average']:.1f}",
        ]


@table(
    "steps",
    "steps_20.json",
    "nodes | speedup | step plan | without a run of its own | fewer Euler steps | DPM++ 2M",
    "python -m benchmarks.steps",
)
def steps(data: Any) -> Iterator[list[str]]:
    """Mean PSNR over prompts and seeds, and the worst image's."""
    kinds: dict[float, dict[str, Any]] = {}
    for one in data["rows"]:
        kinds.setdefault(one["cost"], {})[one["kind"]] = one
    count = data["arguments"]["steps"]
    for cost, rows in kinds.items():
        if "steps" in rows:
            names = ("steps", "steps, resolved", "fewer Euler steps", "DPM++ 2M")
            cells = [_psnr(rows[name]["against_dense"]) for name in names]
            yield [f"{cost * count:.0f} of {count}", f"{1 / cost:.2f}x", *cells]


@table(
    "steps-euler",
    "steps_20_euler.json",
    "nodes | Euler's moves between them",
    'python -m benchmarks.steps --prompts 16 --seeds 1 --only "steps, Euler\'s"',
)
def steps_euler(data: Any) -> Iterator[list[str]]:
    for one in data["rows"]:
        if one["kind"] == "steps, Euler's":
            yield [f"{len(one['nodes'])} of {data['arguments']['steps']}", _psnr(one["against_dense"])]


HEADS = "kept pairs | by what errors do | by the paper's delta"


@table("heads-50", "steps_50.json", HEADS, "python -m benchmarks.steps --steps 50")
@table("heads-28", "steps_28.json", HEADS, "python -m benchmarks.steps --steps 28")
@table("heads-20", "heads_20.json", HEADS, "python -m benchmarks.steps --densities --deltas")
def heads(data: Any) -> Iterator[list[str]]:
    for one in sorted(data["rows"], key=lambda one: -one["cost"]):
        if one["kind"].startswith("heads"):
            cells = [_psnr(one["against_dense"]), ""]
            yield [f"{one['cost']:.2f}", *(cells if one["kind"] == "heads, weighed" else cells[::-1])]


FRONT = {
    "step plan": "steps",
    "heads by what errors do": "heads, weighed",
    "heads by the paper's delta": "heads",
    "steps and heads": "steps and heads",
    "DPM++ 2M, fewer steps": "DPM++ 2M",
    "Euler's, fewer steps": "fewer Euler steps",
}


@table("front", "steps_20.json heads_20.json", "plan | about 2x | 2.5x | 3.3x", "python -m benchmarks.steps")
def front(data: Any) -> Iterator[list[str]]:
    """Each kind at the cost that is nearest: mean and worst PSNR, mean and worst SSIM."""
    rows = [one for file in data for one in file["rows"]]
    for name, kind in FRONT.items():
        mine, cells = [one for one in rows if one["kind"] == kind], []
        for cost in (0.5, 0.4, 0.3):
            nearest = min(mine, key=lambda one: abs(one["cost"] - cost))
            seeds = nearest["against_dense"]
            likeness = f"{mean(seed['ssim'] for seed in seeds):.3f}, {min(seed['worst_ssim'] for seed in seeds):.2f}"
            near = abs(nearest["cost"] - cost) <= 0.06
            cells.append(f"{1 / nearest['cost']:.1f}x: {_psnr(seeds)}; {likeness}" if near else "")
        yield [name, *cells]


@table(
    "promises",
    "promises.json",
    "steps | asked | nodes | of its own run | on 64 others | 95 of 100 images keep | images that keep what was asked",
)
def promises(data: Any) -> Iterator[list[str]]:
    """What plans for a PSNR say of themselves and keep, in dB. Equal plans are one line, for what was asked last."""
    plans = {(one["steps"], one["nodes"]): one for one in data["rows"]}
    for one in plans.values():
        share = mean(x >= one["asked"] for x in one["images"])
        kept = (f"{one[name]:.1f}" for name in ("own_run", "kept", "of_95_in_100"))
        yield [str(one["steps"]), str(one["asked"]), str(one["nodes"]), *kept, f"{share:.0%}"]


def _psnr(seeds: Any) -> str:
    """The mean, and the worst image's."""
    return f"{mean(seed['psnr'] for seed in seeds):.1f}, {min(seed['worst_psnr'] for seed in seeds):.1f}"


@table(
    "learn-8",
    "steps_20_learn_8.json",
    "nodes | speedup | by its own 8 prompts | on 64 others",
    "python -m benchmarks.steps --learn 8",
)
@table(
    "learn",
    "steps_20_learn_16.json",
    "nodes | speedup | by its own 16 prompts | on 64 others",
    "python -m benchmarks.steps --learn 16",
)
def learn(data: Any) -> Iterator[list[str]]:
    count = data["arguments"]["steps"]
    for one in data["rows"]:
        if one["kind"] == "steps":
            cells = f"{one['calibration_psnr']:.1f}", _psnr(one["against_dense"])
            yield [f"{one['cost'] * count:.0f} of {count}", f"{1 / one['cost']:.2f}x", *cells]


@table(
    "pictures",
    "pictures.json",
    "strength | dense steps | steps of the plan | PSNR, dB: mean, worst | SSIM: mean, worst",
    "python -m benchmarks.pictures",
)
def pictures(data: Any) -> Iterator[list[str]]:
    for one in data["rows"]:
        plan = one["plan"]
        likeness = f"{plan['ssim']:.3f}, {plan['worst_ssim']:.2f}"
        yield [f"{one['strength']:g}", str(one["steps"]), str(len(one["nodes"])), _psnr([plan]), likeness]


@table(
    "image-tiles",
    "image_tiles.json",
    "image, px | tiles, px | PSNR to the whole, dB: mean, worst | SSIM: mean, worst | largest difference of 1",
    "python -m benchmarks.image_tiles",
)
def image_tiles(data: Any) -> Iterator[list[str]]:
    for one in data["rows"]:
        likeness = f"{one['ssim']:.3f}, {one['worst_ssim']:.2f}"
        yield [str(one["image"]), str(one["tiles"]), _psnr([one]), likeness, f"{one['most']:.2f}"]


LIMIT = "forwards | speedup | plan to the limit | plan to the dense run | Euler's steps | DPM++ 2M"


@table("limit-50", "steps_50.json", LIMIT)
@table("limit-28", "steps_28.json", LIMIT)
@table("limit-20", "steps_20.json", LIMIT)
def limit(data: Any) -> Iterator[list[str]]:
    """Against the converged images."""
    count = data["arguments"]["steps"]
    kinds: dict[float, dict[str, Any]] = {}
    for one in data["rows"]:
        kind = "fewer Euler steps" if one["kind"] == "dense" else one["kind"]
        kinds.setdefault(one["cost"], {})[kind] = one["against_converged"]
    names = ("steps to the limit", "steps", "fewer Euler steps", "DPM++ 2M")
    for cost, rows in sorted(kinds.items(), reverse=True):
        if "steps to the limit" in rows:
            cells = [_psnr(rows[name]) if name in rows else "" for name in names]
            yield [f"{cost * count:.0f} of {count}", f"{1 / cost:.2f}x", *cells]


@table(
    "step-runs",
    "step_runs_gpu.json",
    "model, size | steps | dense, s | nodes | s | predicted, s | nodes | s | predicted, s",
    "python -m benchmarks.step_runs",
)
def step_runs(data: Any) -> Iterator[list[str]]:
    for one in data["rows"]:
        cells = [f"{one['case']} px", str(one["steps"]), f"{one['dense_s']:.2f}"]
        for name, plan in one["plans"].items():
            if name.startswith("speedup"):
                cells += [str(plan["nodes"]), f"{plan['s']:.2f}", f"{plan['predicted_s']:.2f}"]
        yield cells


@table(
    "head-runs",
    "step_runs_gpu.json",
    "model, size | nodes, heads | kept pairs | s | predicted, s | speedup",
    "python -m benchmarks.step_runs",
)
def head_runs(data: Any) -> Iterator[list[str]]:
    """Whole runs whose plans spare heads, too."""
    for one in data["rows"]:
        for name, plan in one["plans"].items():
            if "density" in plan and not name.startswith("speedup"):
                cells = f"{plan['density']:.2f}", f"{plan['s']:.2f}", f"{plan['predicted_s']:.2f}"
                yield [f"{one['case']} px", name, *cells, f"{one['dense_s'] / plan['s']:.2f}x"]


@table(
    "steps-carried",
    "steps_carried.json",
    "call | speedup | plan of guidance 4, 256 px | plan calibrated for the call",
    "python -m benchmarks.steps_carried",
)
def steps_carried(data: Any) -> Iterator[list[str]]:
    """One step plan under other guidance and at another size, and the call's own."""
    for one in data["rows"]:
        case = one["case"]
        if case:
            name = f"guidance {case['guidance_scale']:g}" if "guidance_scale" in case else f"{case['height']} px"
            yield [name, f"{one['speedup']:g}x", _psnr([one["carried"]]), _psnr([one["own"]])]


@table(
    "checkpoint",
    "checkpoint.json",
    "size | captions | background, colours, shapes right | IoU",
    "python -m toy.evaluate",
)
def checkpoint(data: Any) -> Iterator[list[str]]:
    for one in data:
        found = one["all"]
        right = min(found[name] for name in ("background", "colour", "shape"))
        yield [f"{one['size']} px", str(found["captions"]), f"{right:.0%}", f"{found['iou']:.2f}"]


@table(
    "ablations",
    "ablations_toy.json",
    "kept pairs | by heads | caching layers | DiTFastAttn | DiTFastAttn with arrows",
)
def ablations(data: Any) -> Iterator[list[str]]:
    """SSIM at the densities of the default plans; between two points of a scheme by a straight line, as
    `benchmarks.ablations.at_density` (which needs JAX)."""

    def at(density: float, scheme: str) -> str:
        points = sorted((point["density"], mean(point["ssim"])) for point in data["rows"][scheme])
        inside = points[0][0] <= density <= points[-1][0]
        return f"{np.interp(density, *zip(*points, strict=True)):.2f}" if inside else ""

    others = ("attention caching", "DiTFastAttn", "DiTFastAttn, arrows")
    for point in data["rows"]["c 1.5"]:
        cells = [at(point["density"], scheme) for scheme in others]
        yield [f"{point['density']:.2f}", f"{mean(point['ssim']):.2f}", *cells]


@table("ablations-half", "ablations_toy_half.json", "methods | kept pairs | SSIM", "python -m benchmarks.ablations")
def ablations_half(data: Any) -> Iterator[list[str]]:
    names = {"c 1.5": "arrows and caching"}
    for name, (point,) in data["rows"].items():
        yield [names.get(name, name), f"{point['density']:.2f}", f"{mean(point['ssim']):.2f}"]
