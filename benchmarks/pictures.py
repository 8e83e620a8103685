"""What a step plan keeps where sampling starts from a picture, by the model in the box; and a picture of both ways.

    python -m benchmarks.pictures [--prompts 8] [--strengths 0.3 0.5 0.6 0.7 0.85 1] [--out FILE] [--picture FILE]

The plan in the box is of 20 steps from noise. Each picture is the dense image of another caption. Rows hold the PSNR of
images by the plan against dense ones of the same picture, strength and seed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks.machine import describe_machine
from benchmarks.steps import ROOT, SHAPE, summary
from dfa2_jax import Pipeline, Plan
from dfa2_jax.io.atomic import replacing, write_whole
from dfa2_jax.options import Options
from dfa2_jax.pipeline.decoding import in_bytes
from dfa2_jax.plan.suffix import from_step
from toy.scenes import held_out

BOX = ROOT / "dfa2_jax/demo"
SIDE, GAP = 256, 8
"""Pixels of an image of the picture, and between two."""


def strip(pipeline: Pipeline, plan: Plan, call: dict[str, Any]) -> Image.Image:
    """A picture, its mask, three strengths of another caption, and the mask painted anew; below them, by the plan."""
    source = pipeline("a large red circle on a white background", seed=1, **call).images
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[:, SIDE // 2 :] = 1
    caption = "a large blue star on a white background"
    ways = [{"image": source, "strength": strength} for strength in (0.5, 0.7, 0.9)]
    ways.append({"image": source, "strength": 0.95, "mask_image": mask})
    rows = []
    for options in ({}, {"plan": plan}):
        made = [pipeline(caption, seed=3, **call | options | way).images[0] for way in ways]
        rows.append(np.concatenate([source[0], np.repeat(mask[..., None], 3, -1), *made], axis=1))
    sheet = np.ones((2 * SIDE + GAP, rows[0].shape[1], 3), np.float32)
    sheet[:SIDE], sheet[SIDE + GAP :] = rows
    return Image.fromarray(in_bytes(sheet))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7, 0.85, 1.0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/pictures.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/pictures.png")
    args = parser.parse_args()
    pipeline, plan = Pipeline.from_pretrained(BOX / "toy-sd35", dtype="float32"), Plan.load(BOX / "plan.json")
    steps = plan.setting.num_inference_steps
    call = SHAPE | {"num_inference_steps": steps, "output_type": "np", "progress": False}
    with replacing(args.picture) as file:
        strip(pipeline, plan, call).save(file, "PNG", optimize=True)
    captions = [scene.caption for scene in held_out()][: args.prompts]
    seeds = list(range(args.prompts))
    pictures = pipeline(captions[::-1], seed=[1000 + seed for seed in seeds], **call).images
    content = {"device": jax.devices()[0].device_kind, "machine": describe_machine(), "nodes": plan.nodes}
    rows: list[dict[str, Any]] = []
    for strength in args.strengths:
        options = call | {"image": pictures, "strength": strength, "seed": seeds}
        dense, planned = (pipeline(captions, **options | way) for way in ({}, {"plan": plan}))
        first = pipeline.request(Options(prompt=captions, **options)).first
        nodes = [first + node for node in from_step(plan, first).nodes]
        rows.append({"strength": strength, "steps": steps - first, "nodes": nodes}
                    | {"plan": summary(planned.images, dense.images)})  # fmt: skip
        print(rows[-1], flush=True)
        write_whole(args.out, json.dumps(content | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
