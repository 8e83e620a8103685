"""Does a folder draw what captions say that it never saw? Scores as JSON, and a sheet of images to look at.

python -m toy.evaluate dfa2_jax/demo/toy-sd35 --size 128 --captions 200 --sheet build/sheet.png

FOLDER holds a diffusers pipeline, or what `toy.train --result` wrote.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from dfa2_jax import Pipeline
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.atomic import replacing
from toy import checker
from toy.checker import Score
from toy.result import open_result
from toy.scenes import Scene, held_out

COLUMNS = 8


def sample(pipeline: Pipeline, prompts: list[str], size: int, *, batch: int, **options: Any) -> np.ndarray:
    """Images [prompts, size, size, 3] in [0, 1]; image i has seed i."""
    images = []
    for start in tqdm(range(0, len(prompts), batch)):
        some = prompts[start : start + batch]
        seeds = list(range(start, start + len(some)))
        out = pipeline(some, height=size, width=size, seed=seeds, output_type="np", progress=False, **options)
        images.append(out.images)
    return np.concatenate(images)


def summary(scores: list[Score], scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """Mean scores of all captions, of single things and of pairs."""
    groups = {"all": scores}
    for name, count in (("single", 1), ("pair", 2)):
        groups[name] = [score for score, scene in zip(scores, scenes, strict=True) if len(scene.things) == count]
    return {
        name: {"captions": len(group)} | dict(zip(Score._fields, np.mean(group, axis=0).round(4).tolist(), strict=True))
        for name, group in groups.items()
        if group
    }


def sheet(images: np.ndarray, scenes: list[Scene], scores: list[Score]) -> Image.Image:
    """The images in rows, under each its IoU and its caption."""
    side = max(128, images.shape[1])
    label, font = side * 3 // 16, side * 9 // 128
    rows = -(-len(images) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * side, rows * (side + label)), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, scene, score) in enumerate(zip(images, scenes, scores, strict=True)):
        x, y = i % COLUMNS * side, i // COLUMNS * (side + label)
        page.paste(
            Image.fromarray((image * 255).round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST),
            (x, y),
        )
        words = scene.caption.split()[:-1]
        text = f"{score.iou:.2f} {' '.join(words[: len(words) // 2])}\n{' '.join(words[len(words) // 2 :])}"
        pen.multiline_text((x + 2, y + side), text, fill="black", font_size=font, spacing=1)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--max-sequence-length", type=int, default=32, help="of T5")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", help="of the networks; by default the folder's, float32 on CPU")
    parser.add_argument("--sheet", type=Path, help="PNG of the first 64 images")
    args = parser.parse_args()
    if not 1 <= args.captions <= len(held_out()):
        parser.error(f"--captions {args.captions}: from 1 to {len(held_out())}")
    if not any((args.folder / name).exists() for name in ("model_index.json", "log.json")):
        parser.error(f"{args.folder} is no diffusers folder and no result of toy.train")
    scenes = held_out()[: args.captions]
    options = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "max_sequence_length": args.max_sequence_length,
    }
    started = time.perf_counter()
    exported = (args.folder / "model_index.json").exists()
    checkpoint = open_checkpoint(args.folder) if exported else open_result(args.folder)
    pipeline = Pipeline(checkpoint, dtype=args.dtype)
    images = sample(pipeline, [scene.caption for scene in scenes], args.size, batch=args.batch, **options)
    seconds = time.perf_counter() - started
    scores = [checker.score(image, scene) for image, scene in zip(images, scenes, strict=True)]
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.sheet) as file:
            sheet(images[:64], scenes[:64], scores[:64]).save(file, "PNG")
    where = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": pipeline.dtype.name}
    settings = {"size": args.size, **options, "seconds": round(seconds, 1), **where}
    print(json.dumps(settings | summary(scores, scenes), indent=1))


if __name__ == "__main__":
    main()
