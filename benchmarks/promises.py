"""Thirty step plans: the PSNR that a plan says of itself, and what it keeps on captions that the model never saw.

    python -m benchmarks.promises [--steps 20 28 50] [--prompts 64] [--out benchmarks/results/promises.json]

For each number of steps, ten plans are calibrated for PSNR from 37 to 64 dB on assets/calibration_prompts.txt. A row
holds what was asked, what the plan measured in its own run, and the PSNR of each held-out image against its dense one.
Beside it, `resolved` is the plan that any of these resolves to without a model: what it predicts, and what it keeps.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import jax
from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.steps import ROOT, SHAPE, sample
from dfa2_jax import Pipeline, calibrate
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.report.metrics import psnr
from toy.scenes import held_out

ASKED = range(37, 67, 3)
"""dB."""


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How far predictions and promises are from what was kept, where that is above 37 dB."""
    good = [row for row in rows if row["kept"] > 37]
    resolved = [row["resolved"] for row in rows if row["resolved"]["kept"] > 37]
    return {
        "plans": len(rows),
        "plans above 37 dB": len(good),
        "median |own run - kept|": median(abs(row["own_run"] - row["kept"]) for row in good),
        "median |predicted - kept|, resolved": median(abs(one["predicted"] - one["kept"]) for one in resolved),
        "share of resolved plans whose mean keeps what was asked": mean(
            row["resolved"]["kept"] >= row["asked"] for row in rows if row["resolved"]["kept"] > 37
        ),
        "share of plans whose mean keeps what was asked": mean(row["kept"] >= row["asked"] for row in good),
        "share of images that keep what was asked": mean(x >= row["asked"] for row in good for x in row["images"]),
        "largest excess of the mean": max(row["kept"] - row["asked"] for row in good),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "dfa2_jax/demo/toy-sd35")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 28, 50])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/promises.json")
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.folder, dtype="float32")
    learn = (ROOT / "assets/calibration_prompts.txt").read_text().splitlines()
    judged = [scene.caption for scene in held_out() if scene.caption not in learn][: args.prompts]
    rows: list[dict[str, Any]] = []
    for steps in args.steps:
        shape = SHAPE | {"num_inference_steps": steps}
        dense = sample(pipeline, judged, 1, args.batch, **shape)
        for asked in tqdm(ASKED, f"{steps} steps"):
            plan = calibrate(pipeline, learn, psnr=float(asked), heads="full", progress=False, **shape)
            again = plan.resolve(psnr=float(asked))
            assert plan.step_calibration is not None and again.step_calibration is not None
            kept, of_resolved = (
                sorted(map(psnr, sample(pipeline, judged, 1, args.batch, plan=one), dense)) for one in (plan, again)
            )
            rows.append(
                {
                    "steps": steps,
                    "nodes": len(plan.nodes),
                    "asked": asked,
                    "own_run": plan.step_calibration.psnr,
                    "kept": mean(kept),
                    "of_95_in_100": quantiles(kept, n=20)[0],
                    "images": [round(x, 2) for x in kept],
                    "resolved": {
                        "nodes": len(again.nodes),
                        "predicted": again.step_calibration.psnr,
                        "kept": mean(of_resolved),
                        "of_95_in_100": quantiles(of_resolved, n=20)[0],
                    },
                }
            )
            content = {"device": jax.devices()[0].device_kind, "machine": describe_machine()}
            write_whole(args.out, json.dumps(content | {"rows": rows}, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
