"""A still sheet of frames beside each video of `dfa2 sample --preview`."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from dfa2_jax.io.atomic import replacing
from dfa2_jax.io.videos import Frames, contact_sheet


def preview_path(video: Path) -> Path:
    """The sheet of a video. Videos in a folder end in a number and their suffix, so that no sheet is taken for one."""
    return video.with_suffix(".preview.png")


def write_preview(video: Path, frames: Frames) -> Path:
    """A sheet of at most 12 frames beside their video, whole or not at all. It does not say how it was made.

    Raises:
        OSError: the disk.
    """
    path = preview_path(video)
    with replacing(path) as file:
        contact_sheet(frames).save(file, "PNG")
    return path


def frames_in(video: Path, fps: float) -> Frames:
    """The frames of a file that Pillow reads: one that lasts longer stands for equal ones in a row."""
    frames = []
    with Image.open(video) as image:
        for frame in ImageSequence.Iterator(image):
            pixels = np.asarray(frame.convert("RGB"))
            frames += [pixels] * max(1, round(frame.info.get("duration", 0) * fps / 1000))
    return np.stack(frames)
