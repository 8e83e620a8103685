"""Files that say how their image or video was made: PNG in text chunks, JPEG, WebP and AVIF in EXIF.

`parameters` is the text that other tools read: a chunk of that name, or EXIF's UserComment. The exact account is JSON:
the chunk "dfa2_jax", or EXIF's MakerNote.
"""

import fcntl
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from dfa2_jax.io.atomic import replacing

SUFFIXES = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
QUALITY: dict[str, dict[str, Any]] = {"webp": {"quality": 90}, "jpeg": {"quality": 95, "subsampling": 0}}
CHUNK = "dfa2_jax"
EXIF_FOLDER, MAKER_NOTE, USER_COMMENT = 0x8769, 0x927C, 0x9286  # EXIF 2.3, tables 3 and 4
MAX_EXIF_BYTES = 65_000
"""JPEG's segments have 16-bit lengths."""
SLUG_BYTES = 100
"""File systems take names of 255 bytes; a letter may have four."""


def encode(image: Image.Image, kind: str, metadata: Mapping[str, Any], parameters: str) -> bytes:
    """A file of one of the formats.

    Raises:
        ValueError: JPEG has no room for the metadata.
    """
    file = BytesIO()
    if kind == "png":
        image.save(file, "PNG", pnginfo=text_chunks(metadata, parameters))
    else:
        image.save(file, kind.upper(), exif=exif(kind, metadata, parameters), **QUALITY[kind])
    return file.getvalue()


def text_chunks(metadata: Mapping[str, Any], parameters: str) -> PngInfo:
    """PNG's chunks with both texts."""
    chunks = PngInfo()
    chunks.add_text("parameters", parameters)
    chunks.add_itxt(CHUNK, json.dumps(metadata, ensure_ascii=False))
    return chunks


def exif(kind: str, metadata: Mapping[str, Any], parameters: str) -> Image.Exif:
    """EXIF with both texts.

    Raises:
        ValueError: JPEG has no room for them.
    """
    tags = Image.Exif()
    tags.get_ifd(EXIF_FOLDER).update(
        {
            USER_COMMENT: b"UNICODE\0" + parameters.encode("utf-16-be"),
            MAKER_NOTE: json.dumps(metadata, ensure_ascii=False).encode(),
        }
    )
    nbytes = len(tags.tobytes())
    if kind == "jpeg" and nbytes > MAX_EXIF_BYTES:
        raise ValueError(
            f"prompts and settings take {nbytes} bytes, and a JPEG holds {MAX_EXIF_BYTES}: use png or webp, or a "
            "smaller batch."
        )
    return tags


def read_metadata(path: Path) -> dict[str, Any]:
    """How an image or a video was made, of a file that is complete.

    Raises:
        ValueError: the file is none that says so, or is damaged.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        formats = ("PNG", "JPEG", "WEBP", *(["AVIF"] if features.check("avif") else []))
        with Image.open(path, formats=formats) as image:
            image.verify()  # every chunk to the last
        with Image.open(path, formats=formats) as image:
            image.load()
            if image.format == "PNG":
                said: Any = image.text.get(CHUNK)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                said = image.getexif().get_ifd(EXIF_FOLDER).get(MAKER_NOTE)
        made = None if said is None else json.loads(said)
    except Exception as error:  # Pillow's have many types: damage, bombs
        raise ValueError(f"{path} cannot be read as a PNG, JPEG, WebP or AVIF: {error!s:.200}") from error
    if not isinstance(made, dict):
        raise ValueError(f"{path} does not say how it was made: dfa2_jax did not write it, or a tool took that off.")
    return made


def stem_of(prompt: str, seed: int | None) -> str:
    """The stem of a file name: what is left of the prompt in this file system's encoding, and the seed."""
    encoding = sys.getfilesystemencoding()
    slug = re.sub(r"\W+", "-", prompt.lower()).encode(encoding, "ignore")[:SLUG_BYTES].decode(encoding, "ignore")
    stem = slug.strip("-") or "image"
    return stem if seed is None else f"{stem}-seed{seed}"


def numbered(folder: Path, stem: str, suffixes: Collection[str]) -> list[Path]:
    """The files of this stem, with one of these suffixes, that are in the folder."""
    number = re.compile(re.escape(stem) + r"-\d+(" + "|".join(map(re.escape, suffixes)) + ")")
    return sorted(path for path in folder.glob(f"{stem}-*") if number.fullmatch(path.name))


def write_named(path: Path, data: bytes, overwrite: bool) -> None:
    """A whole file of this name.

    Raises:
        FileExistsError: it is there, and may not be replaced.
    """
    with _turn(path.parent):
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(f"{path} was made by another process meanwhile: choose another name.")
        with replacing(path) as file:
            file.write(data)


def write_new(folder: Path, stem: str, suffix: str, data: bytes) -> Path:
    """A file of the first number that is free, never over another nor in part: two processes take turns."""
    with _turn(folder):
        path = next(path for i in count() if not os.path.lexists(path := folder / f"{stem}-{i}{suffix}"))
        with replacing(path) as file:
            file.write(data)
    return path


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process at a time, of ours; a lock ends with its process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
