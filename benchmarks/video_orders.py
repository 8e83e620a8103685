"""What a second order of tokens gains: PSNR and SSIM against density on the video toy, by what heads may choose.

    python -m benchmarks.video_orders [FOLDER] [--size 64] [--steps 20] [--captions 8] [--out FILE]

Heads may take arrows frame by frame ("native"), over time ("time"), either ("both"), or either and their last output
("both, reuse"). Calibration by the paper's delta sees some held-out captions, and videos of others are compared with
dense ones, frame by frame. Captions are of one object: two may swap their halves of the frame, which no caption names.
Then the least change of the noise costs 50 dB. The floor is a dense video of another seed. A run that was stopped
goes on from the points in its file. So does one of more deltas.
`benchmarks.video_orders_picture` draws it.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.machine import describe_machine
from dfa2_jax import Pipeline, Plan, calibrate
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.plan.method import ORDERS
from dfa2_jax.plan.orders import orders
from dfa2_jax.report.metrics import psnr, ssim
from pallas_kernels import CACHED, FULL
from toy.video_model import FRAMES
from toy.video_scenes import held_out

NATIVE, TIME = ORDERS
KINDS: dict[str, dict[str, Any]] = {
    "native": {"orders": (NATIVE,), "cache": False},
    "time": {"orders": (TIME,), "cache": False},
    "both": {"orders": ORDERS, "cache": False},
    "native, reuse": {"orders": (NATIVE,)},
    "both, reuse": {"orders": ORDERS},
}
DELTAS = 0.02, 0.05, 0.1, 0.2, 0.4
GUIDANCE = 4.0
WINDOWS = 4, 8, 16, 32
"""arrow(1/4) to arrow(1/32)."""
TILES = 8, 8
"""Queries and keys of a tile: a GPU's would hold a band of these short sequences whole."""


def nearness(videos: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """The mean over the frames of each video, and the worst of them."""
    pairs = list(zip(videos, exact, strict=True))
    by_frame = {
        name: np.array([[metric(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs])
        for name, metric in (("psnr", psnr), ("ssim", ssim))
    }
    return {name: values.mean(1).tolist() for name, values in by_frame.items()} | {
        f"worst_{name}": values.min(1).tolist() for name, values in by_frame.items()
    }


def in_letters(plan: Plan) -> list[str]:
    """By step, what all heads of all layers do, layer by layer."""
    windows = plan.half_windows()
    names = np.where(windows == FULL, "f", np.where(windows == CACHED, "c", np.array(["n", "t"])[orders(plan)]))
    return ["".join(step.ravel()) for step in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("dfa2_jax/demo/toy-cogvideox"))
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--captions", type=int, default=8, help="to calibrate on, and as many others to compare")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video_orders.json"))
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.folder)
    captions = [scene.caption for scene in held_out() if len(scene.movers) == 1][: 2 * args.captions]
    learn, test = captions[: args.captions], captions[args.captions :]
    call = {"height": args.size, "width": args.size, "num_frames": FRAMES, "num_inference_steps": args.steps}
    call |= {"guidance_scale": GUIDANCE}
    seeds = list(range(len(test)))

    def sample(plan: Plan | None = None, seeds: list[int] = seeds) -> np.ndarray:
        return pipeline(test, plan=plan, seed=seeds, output_type="np", progress=False, **call).frames

    arrows = {"windows": WINDOWS, "tiles": TILES}
    facts = {"weights": pipeline.setting(prompt=test, **call).weights, "captions": args.captions, **call, **arrows}
    facts = json.loads(json.dumps({"machine": describe_machine(), "device": jax.devices()[0].device_kind} | facts))
    content: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    if content and {name: content.get(name) for name in facts} != facts:
        parser.error(f"{args.out} holds points of another machine, model or call than {facts}: choose another --out.")
    exact = sample()
    content = facts | {"floor": nearness(sample(seeds=[seed + 1000 for seed in seeds]), exact)} | content
    rows = content.setdefault("rows", [])
    done = {(row["kind"], row["delta"]) for row in rows}
    for kind, delta in product(KINDS, DELTAS):
        if (kind, delta) in done:
            continue
        plan = calibrate(pipeline, learn, delta=delta, progress=False, **call, **arrows, **KINDS[kind])
        point = {"kind": kind, "delta": delta, "density": plan.density(), **nearness(sample(plan), exact)}
        rows.append(point | {"steps": in_letters(plan)})
        print(f"{kind}, delta {delta}: density {point['density']:.3f}, {np.mean(point['psnr']):.1f} dB", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
