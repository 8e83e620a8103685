"""Videos on a report's page: dense, plan and difference side by side, in one small animated WebP."""

from io import BytesIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dfa2_jax.io.videos import durations
from dfa2_jax.report.metrics import Video

WIDEST = 240
"""Pixels of a frame's longer side at most."""

MOST_FRAMES = 64
"""Frames at most: of longer videos every second, third, ... is shown."""

SETTINGS = {"quality": 60, "method": 4, "loop": 0}
"""49 frames of three noisy pictures of 240 x 160 took 0.7 MB."""


def small(video: Video) -> Float[np.ndarray, "f h w 3"]:
    """A video's frames for a page, each pixel the mean of a square; edges that fill no square are left out."""
    height, width = video.shape[1:3]
    side = -(-max(height, width) // WIDEST)
    tall, wide = min(side, height), min(side, width)
    rows, columns = height // tall, width // wide
    squares = (
        frame[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide, 3)
        for frame in video[:: stride(len(video))]
    )
    return np.stack([square.mean((1, 3)) for square in squares])


def stride(frames: int) -> int:
    """How many frames of a video lie between two that are shown, the first of both included."""
    return -(-frames // MOST_FRAMES)


def side_by_side(video: Video, exact: Video) -> tuple[UInt8[np.ndarray, "F H 3*W 3"], float]:
    """Dense, plan and difference from left to right, and what the difference is multiplied by."""
    difference = np.abs(video - exact)
    factor = 1 / max(float(difference.max()), 1e-6)
    panels = np.concatenate([exact, video, difference * factor], axis=2)
    return np.round(np.clip(panels, 0, 1) * 255).astype(np.uint8), factor


def webp(frames: UInt8[np.ndarray, "F H W 3"], fps: float) -> bytes:
    """An animated WebP that begins anew at its end."""
    first, *others = map(Image.fromarray, frames)
    times = durations(len(frames), fps, 1)
    first.save(file := BytesIO(), "WEBP", save_all=True, append_images=others, duration=times, **SETTINGS)
    return file.getvalue()
