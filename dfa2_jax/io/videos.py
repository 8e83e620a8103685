"""Video files of frames: animated WebP, AVIF, PNG and GIF by Pillow, and MP4 (H.264) where the extra `video` is.

WebP, AVIF and PNG say how their video was made, as `dfa2_jax.io.images` writes it. GIF and MP4 do not.
"""

import math
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, features

from dfa2_jax.io.atomic import replaceable, replacing
from dfa2_jax.io.extras import need
from dfa2_jax.io.images import exif, text_chunks

SUFFIXES = {".webp": "webp", ".avif": "avif", ".gif": "gif", ".png": "png", ".apng": "png", ".mp4": "mp4"}

TICK_MS = {"webp": 1, "avif": 1, "png": 1, "gif": 10}
"""Milliseconds in which a format counts how long a frame is shown."""

MAX_FPS = {"webp": 1000, "avif": 1000, "png": 1000, "gif": 50, "mp4": 1000}
"""Viewers show a GIF's frames of less than two ticks for a tenth of a second."""

SILENT = "gif", "mp4"
"""Formats that have no place for how their video was made."""

SETTINGS: dict[str, dict[str, Any]] = {
    "webp": {"quality": 85, "method": 4, "loop": 0},
    "avif": {"quality": 70, "speed": 8},
    "png": {"loop": 0},
    "gif": {"loop": 0},
}

# BT.709 is what players assume of a video; the numbers of an untagged one are BT.601's.
COLOURS = "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv"
H264 = f"-an -vf scale=out_color_matrix=bt709:out_range=tv -c:v libx264 -pix_fmt yuv420p -crf 17 {COLOURS}"

MAX_SHOWN = 12
"""Frames of a contact sheet."""

Frames = UInt8[np.ndarray, "F H W 3"] | Sequence[Image.Image]


def save_video(
    frames: Frames,
    path: str | os.PathLike[str],
    *,
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    parameters: str = "",
) -> Path:
    """Write a video, whole or not at all, in the format of the path's suffix.

    Args:
        frames: uint8 [F, H, W, 3], or F PIL images of one size. MP4 takes even heights and widths alone.
        path: .webp, .avif, .gif, .png or .apng, or .mp4, which needs the extra `video`.
        fps: frames a second, from 1 to 1000; GIF has at most 50.
        metadata: how the video was made, JSON-serialisable; GIF and MP4 have no place for it.
        parameters: the same as text, which other tools read; written beside metadata.

    Returns:
        The path.

    Raises:
        ValueError: an unknown suffix, or frames or a rate that the format does not take.
        MissingExtra: MP4 without the extra `video`.
        OSError: the disk, or the folder is not there.
    """
    path = Path(path)
    kind = video_format(path)
    pixels = as_array(frames)
    check_video(kind, fps, pixels.shape[1:3])
    replaceable(path)
    data = encode_video(pixels, kind, fps, metadata, parameters)
    with replacing(path) as file:
        file.write(data)
    return path


def video_format(path: Path) -> str:
    """The format of a suffix.

    Raises:
        ValueError: no video has it.
    """
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} has the suffix {path.suffix!r}, which is none of {', '.join(SUFFIXES)}.")
    return kind


def as_array(frames: Frames) -> UInt8[np.ndarray, "F H W 3"]:
    """Frames as one array, whose bytes lie in order.

    Raises:
        ValueError: there are none, their sizes differ, or an array is not of uint8 [F, H, W, 3].
    """
    if not isinstance(frames, np.ndarray):
        if sizes := sorted({frame.size for frame in frames})[1:]:
            raise ValueError(f"frames have different sizes, such as {frames[0].size} and {sizes[-1]}.")
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in frames]) if frames else np.empty(0)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}, not uint8 [F, H, W, 3] with F, H, W from 1.")
    return np.ascontiguousarray(frames)


def durations(count: int, fps: float, tick_ms: int) -> list[int]:
    """Milliseconds of each frame in whole ticks; any number of them lasts as long as it should, to half a tick.

    So 15 frames a second take 67, 66, 67, ... ms, as one of them would take 66.67 ms.
    """
    ends = [math.floor(number * 1000 / fps / tick_ms + 0.5) for number in range(count + 1)]
    return [tick_ms * (end - start) for start, end in zip(ends, ends[1:], strict=False)]


def check_video(kind: str, fps: float, size: tuple[int, ...]) -> None:
    """Whether a format is there, and takes this rate, and frames of this height and width.

    Raises:
        ValueError: it does not.
        MissingExtra: MP4 without the extra `video`.
    """
    if kind in ("webp", "avif") and not features.check(kind):
        raise ValueError(f"this Pillow lacks {kind}: choose .png or .gif.")
    if not 1 <= fps <= MAX_FPS[kind]:  # NaN is not, either
        raise ValueError(f"{fps=} is not from 1 to {MAX_FPS[kind]}, the frames a second that .{kind} takes.")
    if kind == "mp4":
        height, width = size
        if height % 2 or width % 2:
            raise ValueError(f"{height=} and {width=} must be even for .mp4: choose other sizes, or .webp.")
        need("imageio_ffmpeg", "a video in .mp4", "video")


def encode_video(
    frames: UInt8[np.ndarray, "F H W 3"], kind: str, fps: float, metadata: Mapping[str, Any] | None, parameters: str
) -> bytes:
    """A file of one of the formats.

    Raises:
        OSError: ffmpeg fails.
    """
    return mp4(frames, fps) if kind == "mp4" else animation(frames, kind, fps, metadata, parameters)


def animation(
    frames: UInt8[np.ndarray, "F H W 3"], kind: str, fps: float, metadata: Mapping[str, Any] | None, parameters: str
) -> bytes:
    """A file of a format that Pillow writes. Equal frames in a row may be stored as one that lasts as long."""
    settings = SETTINGS[kind] | {"duration": durations(len(frames), fps, TICK_MS[kind])}
    if metadata is not None and kind == "png":
        settings["pnginfo"] = text_chunks(metadata, parameters)
    elif metadata is not None and kind != "gif":
        settings["exif"] = exif(kind, metadata, parameters).tobytes()  # Pillow 13 drops an `Exif` from AVIF
    first, *others = images_of(frames)
    file = BytesIO()
    first.save(file, kind.upper(), save_all=True, append_images=others, **settings)
    return file.getvalue()


def images_of(frames: UInt8[np.ndarray, "F H W 3"]) -> Iterator[Image.Image]:
    return map(Image.fromarray, frames)


def mp4(frames: UInt8[np.ndarray, "F H W 3"], fps: float) -> bytes:
    with TemporaryFile() as file:
        run_ffmpeg(need("imageio_ffmpeg", "a video in .mp4", "video").get_ffmpeg_exe(), frames, file, fps)
        file.seek(0)
        return file.read()


def run_ffmpeg(ffmpeg: str, frames: UInt8[np.ndarray, "F H W 3"], file: IO[bytes], fps: float) -> None:
    """H.264 in MP4, into an open file: ffmpeg opens it a second time by its number, because MP4 needs seeking."""
    height, width = frames.shape[1:3]
    source = f"-f rawvideo -pix_fmt rgb24 -video_size {width}x{height} -framerate {fps} -i pipe:0"
    target = f"-movflags +faststart -f mp4 -y /dev/fd/{file.fileno()}"
    command = [ffmpeg, *f"-hide_banner -loglevel error {source} {H264} {target}".split()]
    done = subprocess.run(command, input=frames.data.cast("B"), capture_output=True, pass_fds=[file.fileno()])
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise OSError(f"ffmpeg ended with code {done.returncode}: {said:.500}")


def contact_sheet(frames: Frames, columns: int | None = None) -> Image.Image:
    """A grid of at most 12 frames, the first, the last and others evenly between, in rows from the top left.

    Args:
        frames: uint8 [F, H, W, 3], or F PIL images of one size.
        columns: of the grid; None: about as many as rows.

    Raises:
        ValueError: frames as in `save_video`, or no columns.
    """
    pixels = as_array(frames)
    shown = np.linspace(0, len(pixels) - 1, min(len(pixels), MAX_SHOWN)).round().astype(int)
    columns = math.ceil(math.sqrt(len(shown))) if columns is None else min(columns, len(shown))
    if columns < 1:
        raise ValueError(f"{columns=} must be 1 or more.")
    height, width = pixels.shape[1:3]
    sheet = Image.new("RGB", (columns * width, math.ceil(len(shown) / columns) * height))
    for place, number in enumerate(shown):
        sheet.paste(Image.fromarray(pixels[number]), (place % columns * width, place // columns * height))
    return sheet
