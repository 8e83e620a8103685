"""How far images that are decoded in tiles are from whole ones, by the autoencoder in the box; and the worst seam.

    python -m benchmarks.image_tiles [--images 16] [--out FILE] [--picture FILE]

Drawn scenes of 512 px are encoded and decoded, whole and in tiles of 128 px, 32 of them blended. Norms see a tile.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from benchmarks.machine import describe_machine
from benchmarks.steps import ROOT, summary
from dfa2_jax import Pipeline
from dfa2_jax.io.atomic import replacing, write_whole
from dfa2_jax.pipeline.decoding import in_bytes
from dfa2_jax.pipeline.start import moments_of
from toy.scenes import draw, held_out

PIXELS, CROP, GAIN = 512, 192, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/image_tiles.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/tiles.png")
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(ROOT / "dfa2_jax/demo/toy-sd35", dtype="float32")
    vae = pipeline.networks.config("vae")
    numbers = jax.numpy.array([scene.numbers() for scene in held_out()[: args.images]])
    whole, tiled = [], []
    for scene in np.asarray(draw(numbers, jax.random.key(0), PIXELS)):
        moments = moments_of(pipeline, 2 * scene - 1, None)
        latents = vae.drawn(moments, np.zeros(1, np.float32)).transpose(0, 3, 1, 2)[:, :, None]
        whole.append(pipeline.decode(latents)[0, 0])
        tiled.append(pipeline.decode(latents, tiling=True)[0, 0])
    difference = np.abs(np.array(tiled) - np.array(whole)).max(-1)
    number, row, column = np.unravel_index(difference.argmax(), difference.shape)
    top, left = (int(np.clip(place - CROP // 2, 0, PIXELS - CROP)) for place in (row, column))
    crop = (slice(top, top + CROP), slice(left, left + CROP))
    far = np.repeat(np.clip(GAIN * difference[number][crop], 0, 1)[..., None], 3, -1)
    with replacing(args.picture) as file:
        parts = [whole[number][crop], tiled[number][crop], 1 - far]
        sheet = Image.fromarray(in_bytes(np.concatenate(parts, axis=1)))
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(file, "PNG", optimize=True)
    row = {"tiles": vae.tiles().rows.size * vae.tiles().scale, "image": PIXELS, "most": float(difference.max())}
    row |= {"mean": float(difference.mean())} | summary(np.array(tiled), np.array(whole))
    content = {"device": jax.devices()[0].device_kind, "machine": describe_machine(), "rows": [row]}
    write_whole(args.out, json.dumps(content, indent=1) + "\n")
    print(row)


if __name__ == "__main__":
    main()
