"""The README's picture: diffusers, dfa2_jax and their difference, from the same prompt and seed, in float32.

    python -m benchmarks.parity_picture DIR [--out docs/parity.png]

DIR holds the folders that `python tests/tiny.py DIR` writes. Their weights are random: look for equality, not beauty.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from dfa2_jax import Pipeline
from dfa2_jax.io.atomic import replacing

PROMPT, SEED, SIZE = "a large red circle on the left of a blue background", 7, 192
AMPLIFIED = 1_000_000
ROWS = {"sd35": {"guidance_scale": 4.5}, "flux-dev": {"guidance_scale": 3.5}}


def row(folder: Path, guidance: dict[str, float]) -> list[np.ndarray]:
    """[diffusers, ours, |difference| amplified], each float [SIZE, SIZE, 3] in [0, 1]."""
    common = {"height": SIZE, "width": SIZE, "num_inference_steps": 8, "output_type": "np", **guidance}
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs = pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), **common).images[0]
    ours = Pipeline.from_pretrained(folder)(PROMPT, seed=SEED, progress=False, **common).images[0]
    print(f"{folder.name}: largest difference of a pixel {np.abs(theirs - ours).max():.1e}")
    return [theirs, ours, np.clip(np.abs(theirs - ours) * AMPLIFIED, 0, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("docs/parity.png"))
    args = parser.parse_args()
    grid = np.concatenate([np.concatenate(row(args.folder / name, g), axis=1) for name, g in ROWS.items()])
    picture = Image.new("RGB", (grid.shape[1], grid.shape[0] + 20), "white")
    picture.paste(Image.fromarray((grid * 255).round().astype(np.uint8)), (0, 20))
    labels = ("diffusers", "dfa2_jax", f"difference x {AMPLIFIED:,}")
    for column, label in enumerate(labels):
        ImageDraw.Draw(picture).text((column * SIZE + 6, 5), label, fill="black")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as file:
        picture.save(file, "PNG")


if __name__ == "__main__":
    main()
