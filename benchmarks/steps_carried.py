"""Whether a step plan may be carried to another guidance or size: by the model in the box.

    python -m benchmarks.steps_carried [--speedups 2 2.5] [--out benchmarks/results/steps_carried.json]

Plans are calibrated at 256 px and guidance 4. They are judged on held-out captions under other guidance and at other
sizes, each against the dense images there. `own` is a plan that was calibrated there.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.steps import ROOT, SHAPE, sample, summary
from dfa2_jax import Pipeline, Plan, calibrate
from dfa2_jax.io.atomic import replacing
from toy.scenes import held_out

STEPS = {"num_inference_steps": 20}
CASES: list[dict[str, Any]] = [
    {},
    *({"guidance_scale": scale} for scale in (2.0, 3.0, 6.0, 8.0)),
    *({"height": size, "width": size} for size in (192,)),  # the model's largest is 256
]


def carried(plan: Plan, pipeline: Pipeline, shape: dict[str, Any]) -> Plan:
    """The same nodes and moves, for another call."""
    made = Plan.full(pipeline.setting(prompt="", **shape, **STEPS), plan.nodes)
    return replace(made, coefficients=plan.coefficients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "dfa2_jax/demo/toy-sd35")
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 2.5])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/steps_carried.json")
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.folder, dtype="float32")
    learn = (ROOT / "assets/calibration_prompts.txt").read_text().splitlines()
    judged = [scene.caption for scene in held_out() if scene.caption not in learn][: args.prompts]

    def found(shape: dict[str, Any], speedup: float) -> Plan:
        return calibrate(pipeline, learn, speedup=speedup, progress=False, **shape, **STEPS)

    plans = {speedup: found(SHAPE, speedup) for speedup in args.speedups}
    made: list[dict[str, Any]] = []
    for case in tqdm(CASES, "cases"):
        shape = SHAPE | case
        dense = sample(pipeline, judged, 1, args.batch, **shape, **STEPS)
        for speedup, plan in plans.items():
            row: dict[str, Any] = {"case": case, "speedup": speedup}
            own = plan if not case else found(shape, speedup)
            for name, there in (("carried", carried(plan, pipeline, shape)), ("own", own)):
                images = sample(pipeline, judged, 1, args.batch, plan=there, guidance_scale=shape["guidance_scale"])
                row |= {name: summary(images, dense), f"{name}_nodes": there.nodes}
            made.append(row)
            tqdm.write(
                f"{case} {speedup}x: {row['carried']['psnr']} by the carried plan, {row['own']['psnr']} by its own"
            )
        content = {"device": jax.devices()[0].device_kind, "machine": describe_machine(), "rows": made}
        with replacing(args.out) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
