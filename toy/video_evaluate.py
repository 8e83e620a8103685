"""Does a folder draw videos of captions that it never saw? Scores as JSON, and a sheet of frames to look at.

python -m toy.video_evaluate dfa2_jax/demo/toy-cogvideox --size 64 --captions 200 --sheet build/sheet.png

FOLDER holds a diffusers pipeline, or what `toy.video_train --result` wrote.
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
from dfa2_jax.families.cogvideox.family import CogVideoX
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.atomic import replacing
from toy import video_model
from toy.result import ResultCheckpoint, read_arrays
from toy.video_checker import VideoScore, observe, score
from toy.video_scenes import MovingScene, held_out

SHOWN, LABEL = 5, 14
"""Frames of a video on the sheet, and the height of its caption."""


def open_video_result(folder: Path) -> ResultCheckpoint:
    """A folder that `toy.video_train --result` wrote."""
    arrays = read_arrays(folder)
    configs = {name: video_model.config(name, arrays) for name in video_model.configs()}
    scheduler = {"_class_name": "CogVideoXDDIMScheduler"} | video_model.SCHEDULER
    configs |= {"scheduler": scheduler}
    return ResultCheckpoint(folder, CogVideoX, arrays, configs, video_model.write_tokenizer)


def sample(pipeline: Pipeline, prompts: list[str], size: int, *, batch: int, **options: Any) -> np.ndarray:
    """Videos [prompts, frames, size, size, 3] in [0, 1]; video i has seed i."""
    videos = []
    for start in tqdm(range(0, len(prompts), batch)):
        some = prompts[start : start + batch]
        seeds = list(range(start, start + len(some)))
        out = pipeline(some, height=size, width=size, seed=seeds, output_type="np", progress=False, **options)
        videos.append(out.frames)
    return np.concatenate(videos)


def summary(scores: list[VideoScore], scenes: list[MovingScene]) -> dict[str, dict[str, float]]:
    """Mean scores of all captions, of single things and of pairs."""
    numbers = np.array([len(scene.movers) for scene in scenes])
    groups = {"all": numbers > 0, "single": numbers == 1, "pair": numbers == 2}
    means = {name: np.array(scores)[chosen] for name, chosen in groups.items() if chosen.any()}
    return {
        name: {"captions": len(group)} | dict(zip(VideoScore._fields, group.mean(0).round(4).tolist(), strict=True))
        for name, group in means.items()
    }


def sheet(videos: np.ndarray, scenes: list[MovingScene]) -> Image.Image:
    """Some frames of each video in a row, under them its caption and what the checker sees."""
    side = videos.shape[2]
    page = Image.new("RGB", (SHOWN * 2 * side, len(videos) * (side + 2 * LABEL)), "white")
    pen = ImageDraw.Draw(page)
    for row, (video, scene) in enumerate(zip(videos, scenes, strict=True)):
        y = row * (side + 2 * LABEL)
        for column, frame in enumerate(np.linspace(0, len(video) - 1, SHOWN).round().astype(int)):
            picture = Image.fromarray((video[frame] * 255).round().astype(np.uint8))
            page.paste(picture, (column * side, y))
        seen = "; ".join(" ".join(mover) for mover in observe(video).movers)
        pen.multiline_text((2, y + side), f"{scene.caption}\nseen: {seen}", fill="black", font_size=10, spacing=1)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40, help="of which 1,000 is a multiple: others leave noise")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", help="of the networks; by default the folder's, float32 on CPU")
    parser.add_argument("--sheet", type=Path, help="PNG of the first 24 videos")
    args = parser.parse_args()
    if not 1 <= args.captions <= len(held_out()):
        parser.error(f"--captions {args.captions}: from 1 to {len(held_out())}")
    if not any((args.folder / name).exists() for name in ("model_index.json", "log.json")):
        parser.error(f"{args.folder} is no diffusers folder and no result of toy.video_train")
    scenes = held_out()[: args.captions]
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "num_frames": video_model.FRAMES}
    started = time.perf_counter()
    is_exported = (args.folder / "model_index.json").exists()
    checkpoint = open_checkpoint(args.folder) if is_exported else open_video_result(args.folder)
    pipeline = Pipeline(checkpoint, dtype=args.dtype)
    videos = sample(pipeline, [scene.caption for scene in scenes], args.size, batch=args.batch, **options)
    seconds = time.perf_counter() - started
    scores = [score(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.sheet) as file:
            sheet(videos[:24], scenes[:24]).save(file, "PNG")
    where = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": pipeline.dtype.name}
    settings = {"size": args.size, **options, "seconds": round(seconds, 1), **where}
    print(json.dumps(settings | summary(scores, scenes), indent=1))


if __name__ == "__main__":
    main()
