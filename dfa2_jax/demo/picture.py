"""The picture of `dfa2 demo`: each prompt dense, by the plan, and where the two differ. Needs Pillow alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw

from dfa2_jax.io.atomic import replacing

AMPLIFIED = 4
"""A difference of a quarter of the range is white."""
GAP, FONT, LINE = 14, 15, 20
"""Pixels: between cells, of letters, and from line to line."""
WIDTH = 330
"""The least width of a picture: that of its first line."""
COLUMNS = 4
"""Prompts beside each other; more go below."""
LETTERS = FONT / 2
"""Pixels a letter takes on average."""


@dataclass(frozen=True)
class Pair:
    """A prompt's image, dense and by the plan, and the seconds that the steps of each took."""

    prompt: str
    images: tuple[Image.Image, Image.Image]
    seconds: tuple[float, float]

    def difference(self) -> np.ndarray:
        """The planned pixels less the dense ones, float32 [H, W, 3], from -255 to 255."""
        dense, planned = (np.asarray(image, np.float32) for image in self.images)
        return planned - dense

    def psnr(self) -> float:
        """In dB; infinite for equal images."""
        error = np.square(self.difference()).mean()
        return float(10 * np.log10(255**2 / error)) if error else float("inf")


def draw(pairs: Sequence[Pair], plan: str, path: Path) -> None:
    """What the plan runs, and a column for each pair: prompt, dense image, the plan's, their difference; seconds and
    PSNR."""
    width, height = pairs[0].images[0].size
    prompts = [wrap(pair.prompt, max(1, int(width / LETTERS))) for pair in pairs]
    heading = max(map(len, prompts)) * LINE
    cell, column = height + LINE + GAP, heading + 3 * (height + LINE + GAP)
    columns, rows = min(COLUMNS, len(pairs)), -(-len(pairs) // COLUMNS)
    page = Image.new(
        "RGB", (max(WIDTH, GAP + columns * (width + GAP)), 2 * GAP + LINE + rows * (column + GAP)), "white"
    )
    pen = ImageDraw.Draw(page)

    def write(x: float, y: float, text: str, colour: str = "black") -> None:
        pen.text((x, y), text, fill=colour, font_size=FONT)

    write(GAP, GAP, f"The plan runs {plan}.")
    for number, (pair, lines) in enumerate(zip(pairs, prompts, strict=True)):
        x = GAP + number % COLUMNS * (width + GAP)
        y = 2 * GAP + LINE + number // COLUMNS * (column + GAP)
        write(x, y + heading - len(lines) * LINE, "\n".join(lines))
        amplified = np.clip(np.abs(pair.difference()) * AMPLIFIED, 0, 255).astype(np.uint8)
        shown = {
            f"dense, {pair.seconds[0]:.1f} s": pair.images[0],
            f"by the plan, {pair.seconds[1]:.1f} s": pair.images[1],
            f"difference x {AMPLIFIED}, PSNR {pair.psnr():.1f} dB": Image.fromarray(amplified),
        }
        y += heading + GAP // 2
        for caption, image in shown.items():
            page.paste(image, (x, y))
            pen.rectangle((x - 1, y - 1, x + width, y + height), outline="gray")
            write(x, y + height + 2, caption, "dimgray")
            y += cell
    file = BytesIO()
    page.save(file, "PNG")
    with replacing(path) as target:
        target.write(file.getvalue())
