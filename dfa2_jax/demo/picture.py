"""The picture of `dfa2 demo`: each prompt dense, by the plan, and where the two differ; of videos it moves. Needs
Pillow alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw

from dfa2_jax.io.atomic import replacing
from dfa2_jax.io.videos import save_video

AMPLIFIED = 4
"""A difference of a quarter of the range is white."""
GAP, FONT, LINE = 14, 15, 20
"""Pixels: between cells, of letters, and from line to line."""
WIDTH = 330
"""The least width of a picture: that of its first line."""
NARROWEST = 250
"""Pixels of a cell at least, as its caption takes; those of smaller images become squares."""
COLUMNS = 4
"""Prompts beside each other; more go below."""
LETTERS = FONT / 2
"""Pixels a letter takes on average."""

Frames = Sequence[Image.Image]


@dataclass(frozen=True)
class Pair:
    """A prompt's image or video, dense and by the plan, and the seconds that the steps of each took.

    frames: an image is one.
    """

    prompt: str
    frames: tuple[Frames, Frames]
    seconds: tuple[float, float]

    def difference(self, frame: int) -> np.ndarray:
        """The planned pixels of a frame less the dense ones, float32 [H, W, 3], from -255 to 255."""
        dense, planned = (np.asarray(frames[frame], np.float32) for frames in self.frames)
        return planned - dense

    def psnr(self) -> float:
        """PSNR over all pixels of all frames, in dB; infinite for equal images."""
        error = np.mean([np.square(self.difference(frame)).mean() for frame in range(len(self.frames[0]))])
        return float(10 * np.log10(255**2 / error)) if error else float("inf")


def draw(pairs: Sequence[Pair], plan: str, path: Path, fps: float | None = None) -> None:
    """What the plan runs, and a column for each pair: prompt, dense image, the plan's, their difference; seconds and
    PSNR.

    Args:
        fps: of videos, which become an animation in the format of the path's suffix; None: of images, a PNG.
    """
    pages = [page(pairs, plan, frame) for frame in range(len(pairs[0].frames[0]))]
    if fps is not None:
        save_video(pages, path, fps=fps)
        return
    file = BytesIO()
    pages[0].save(file, "PNG")
    with replacing(path) as target:
        target.write(file.getvalue())


def page(pairs: Sequence[Pair], plan: str, frame: int) -> Image.Image:
    """The picture of one frame."""
    first = pairs[0].frames[0][0]
    times = -(-NARROWEST // first.width)
    width, height = times * first.width, times * first.height
    prompts = [wrap(pair.prompt, max(1, int(width / LETTERS))) for pair in pairs]
    heading = max(map(len, prompts)) * LINE
    cell, column = height + LINE + GAP, heading + 3 * (height + LINE + GAP)
    columns, rows = min(COLUMNS, len(pairs)), -(-len(pairs) // COLUMNS)
    size = max(WIDTH, GAP + columns * (width + GAP)), 2 * GAP + LINE + rows * (column + GAP)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)

    def write(x: float, y: float, text: str, colour: str = "black") -> None:
        pen.text((x, y), text, fill=colour, font_size=FONT)

    write(GAP, GAP, f"The plan runs {plan}.")
    for number, (pair, lines) in enumerate(zip(pairs, prompts, strict=True)):
        x = GAP + number % COLUMNS * (width + GAP)
        y = 2 * GAP + LINE + number // COLUMNS * (column + GAP)
        write(x, y + heading - len(lines) * LINE, "\n".join(lines))
        amplified = np.clip(np.abs(pair.difference(frame)) * AMPLIFIED, 0, 255).astype(np.uint8)
        shown = {
            f"dense, {pair.seconds[0]:.1f} s": pair.frames[0][frame],
            f"by the plan, {pair.seconds[1]:.1f} s": pair.frames[1][frame],
            f"difference x {AMPLIFIED}, PSNR {pair.psnr():.1f} dB": Image.fromarray(amplified),
        }
        y += heading + GAP // 2
        for caption, image in shown.items():
            picture.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
            pen.rectangle((x - 1, y - 1, x + width, y + height), outline="gray")
            write(x, y + height + 2, caption, "dimgray")
            y += cell
    return picture
