"""Images of step plans against dense ones, beside fewer Euler steps and plans of heads, by the model in the box.

    python -m benchmarks.steps [--steps 20] [--seeds 1 2 3 4] [--speedups 1.5 2 2.5 3.3] [--deltas 0.05 0.1 0.4]
        [--densities 0.5 0.4] [--shares 0.6] [--prompts 64] [--batch 16] [--out benchmarks/results/steps_20.json]

Plans are calibrated on assets/calibration_prompts.txt with seed 0 (`--learn`: and on other captions), and judged on
captions that the model never saw. Each row is compared with the dense image, and with a converged one of many more
steps. `cost` is the share of the dense run's forwards. For heads it is the density, as if attention were all.
Results are kept after every row.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.machine import describe_machine
from dfa2_jax import Pipeline, Plan, calibrate
from dfa2_jax.io.atomic import replacing
from dfa2_jax.report.metrics import psnr, ssim
from toy.scenes import held_out

ROOT = Path(__file__).parent.parent
SHAPE = {"height": 256, "width": 256, "guidance_scale": 4.0, "max_sequence_length": 32}


def sample(pipeline: Pipeline, prompts: list[str], seed: int, batch: int, **options: Any) -> np.ndarray:
    """Images [prompts, H, W, 3] in [0, 1]; image i has seed 1000 * seed + i."""
    images = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        seeds = [1000 * seed + start + i for i in range(len(some))]
        images.append(pipeline(some, seed=seeds, output_type="np", progress=False, **options).images)
    return np.concatenate(images)


def summary(images: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    with ThreadPoolExecutor() as pool:
        decibels, alike = (list(pool.map(metric, images, exact)) for metric in (psnr, ssim))
    return {
        "psnr": round(float(np.mean(decibels)), 3),
        "worst_psnr": round(min(decibels), 3),
        "ssim": round(float(np.mean(alike)), 5),
        "worst_ssim": round(min(alike), 5),
    }


def plans(pipeline: Pipeline, learn: list[str], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], Plan]]:
    """Kind, what is said of it, and the plan."""
    shape = SHAPE | {"num_inference_steps": args.steps, "progress": False}
    for speedup in args.speedups:
        plan = calibrate(pipeline, learn, speedup=speedup, **shape)
        record = plan.step_calibration
        assert record is not None
        told = {"nodes": plan.nodes, "growth": [round(x, 3) for x in record.growth]}
        told |= {"unfitted": [run.model_dump() for run in record.unfitted]}
        errors = {"predicted_error": record.predicted_error, "measured_error": record.measured_error}
        yield "steps", told | errors | {"calibration_psnr": round(record.psnr, 3)}, plan
        again = plan.resolve(speedup=speedup)
        assert again.step_calibration is not None
        yield (
            "steps, resolved",
            {"nodes": again.nodes, "calibration_psnr": round(again.step_calibration.psnr, 3)},
            again,
        )
        euler = Plan.full(plan.setting, plan.nodes)
        yield "steps, Euler's", {"nodes": euler.nodes}, euler
    limit = args.speedups and (not args.only or "steps to the limit" in args.only)
    for speedup in [1.0, *args.speedups] if limit else []:
        plan = calibrate(pipeline, learn, speedup=speedup, target="converged", **shape)
        assert plan.step_calibration is not None
        told = {"nodes": plan.nodes, "calibration_psnr": round(plan.step_calibration.psnr, 3)}
        yield "steps to the limit", told, plan
    for delta in args.deltas:
        yield "heads", {"delta": delta}, calibrate(pipeline, learn, delta=delta, tiles=(64, 64), **shape)
    for density in args.densities:
        options = {"heads": "only", "attention_share": 1.0, "tiles": (64, 64), "speedup": 1 / density}
        yield "heads, weighed", {}, calibrate(pipeline, learn, **options, **shape)
    for share in args.shares:
        for speedup in args.joint_speedups:
            for heads in ("full", "auto"):
                options = {"heads": heads, "speedup": speedup} | ({"attention_share": share} if heads == "auto" else {})
                plan = calibrate(pipeline, learn, **options, **shape)
                told = {"attention_share": share, "heads": heads, "nodes": plan.nodes, "density": plan.density()}
                yield "steps and heads", told, plan


def rows(pipeline: Pipeline, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    judged = [scene.caption for scene in held_out()]
    learn = (ROOT / "assets/calibration_prompts.txt").read_text().splitlines()
    others = [caption for caption in judged if caption not in learn]
    judged, learn = others[: args.prompts], [*learn, *others[args.prompts :]][: args.learn]

    def images(**options: Any) -> list[np.ndarray]:
        return [sample(pipeline, judged, seed, args.batch, **options) for seed in args.seeds]

    def compared(made: list[np.ndarray]) -> dict[str, Any]:
        both = {"against_dense": dense, "against_converged": converged}
        return {name: [summary(*pair) for pair in zip(made, exact, strict=True)] for name, exact in both.items()}

    dense = images(num_inference_steps=args.steps, **SHAPE)
    converged = images(num_inference_steps=args.converged * args.steps, **SHAPE)
    yield {"kind": "dense", "cost": 1.0, **compared(dense)}
    counts = set()
    for kind, told, plan in plans(pipeline, learn, args):
        if args.only and kind not in args.only:
            continue
        cost = len(plan.nodes) / args.steps * plan.density()
        record = plan.step_calibration
        errors = {} if record is None else {"calibration_psnr": round(record.psnr, 3)}
        if "attention_share" in told:
            cost = plan.cost(told["attention_share"])
        yield {"kind": kind, "cost": round(cost, 4), **errors, **told, **compared(images(plan=plan, **SHAPE))}
        counts.add(len(plan.nodes))
    for count in sorted(counts) if not args.only else ():
        cost = round(count / args.steps, 4)
        if count < args.steps:
            fewer = images(num_inference_steps=count, **SHAPE)
            yield {"kind": "fewer Euler steps", "cost": cost, **compared(fewer)}
        other = images(num_inference_steps=count, scheduler="DPMSolverMultistepScheduler", **SHAPE)
        yield {"kind": "DPM++ 2M", "cost": cost, **compared(other)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "dfa2_jax/demo/toy-sd35")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--converged", type=int, default=16, help="times the steps, for the limit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--speedups", type=float, nargs="*", default=[1.5, 2.0, 2.5, 20 / 7, 3.3])
    parser.add_argument("--deltas", type=float, nargs="*", default=[0.03, 0.1, 0.2, 0.4])
    parser.add_argument("--densities", type=float, nargs="*", default=[], help="of heads, by what their errors do")
    parser.add_argument("--shares", type=float, nargs="*", default=[], help="attention's, for plans of steps and heads")
    parser.add_argument("--joint-speedups", type=float, nargs="*", default=[1.5, 2.0, 3.0], help="of these plans")
    parser.add_argument("--only", nargs="*", default=[], metavar="KIND", help="of plans, as results name it")
    parser.add_argument("--learn", type=int, default=4, help="prompts of the calibration")
    parser.add_argument("--prompts", type=int, default=64, help="that are judged")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.folder, dtype="float32")
    made: list[dict[str, Any]] = []
    for row in tqdm(rows(pipeline, args), "rows", 4 + 6 * len(args.speedups) + len(args.deltas)):
        made.append(row)
        arguments = {**vars(args), "folder": args.folder.name, "out": args.out.name}
        content = {"device": jax.devices()[0].device_kind, "machine": describe_machine(), "arguments": arguments}
        with replacing(args.out) as file:
            file.write(json.dumps(content | {"rows": made}, indent=1).encode())
        best = [round(seed["psnr"], 2) for seed in row["against_dense"]]
        tqdm.write(f"{row['kind']:18s} cost {row['cost']:.3f} PSNR {best}")


if __name__ == "__main__":
    main()
