"""The picture that sampling starts from, and the mask of what is painted anew: as diffusers reads both.

Host code: Pillow and NumPy. What the autoencoder makes of them is in `pipeline.start`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError

from dfa2_jax.io.arrays import host_array
from dfa2_jax.options import Options


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a call makes its images from.

    pixels: in [-1, 1]; latents: in place of them, as the sampler has them.
    mask: 1 where the sampler paints, 0 where the picture stays; None: it paints everywhere.
    """

    pixels: Float[np.ndarray, "images H W 3"] | None
    latents: Float[np.ndarray, "images C h w"] | None
    mask: Float[np.ndarray, "masks H W"] | None

    @property
    def count(self) -> int:
        return len(self.latents if self.pixels is None else self.pixels)  # type: ignore[arg-type]

    @property
    def digest(self) -> str:
        """The sha256 of all numbers."""
        digest = hashlib.sha256()
        for x in (self.pixels, self.latents, self.mask):
            digest.update(b"" if x is None else f"{x.shape}".encode() + x.tobytes())
        return f"sha256:{digest.hexdigest()}"


def source_of(
    options: Options,
    size: tuple[int, int],
    latent_channels: int,
    batch: int,
    reference_sizes: Sequence[tuple[int, int]] = (),
) -> Source | None:
    """The picture of a call, at the call's size; None: it starts from noise.

    Args:
        size: height and width in pixels.
        reference_sizes: sizes of which the picture takes the one nearest to its shape, in place of the call's.
        batch: images of the call, which pictures and masks must divide.

    Raises:
        ValueError: an argument is no picture, or of another size, or goes with another that is missing.
    """
    if options.image is None:
        for name in ("mask_image", "strength"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{name}={value!r:.100} goes with image, which is None.")
        return None
    pixels = latents = mask = None
    if reference_sizes:
        size = reference_size(options.image, reference_sizes)
    if _is_latent(options.image, latent_channels):
        latents = np.asarray(host_array("image", options.image), np.float32)
    else:
        pixels = 2 * _pictures("image", options.image, size, "RGB") - 1
    if options.mask_image is not None:
        mask = (_pictures("mask_image", options.mask_image, size, "L")[..., 0] >= 0.5).astype(np.float32)
    source = Source(pixels=pixels, latents=latents, mask=mask)
    for name, count in (("image", source.count), ("mask_image", 1 if mask is None else len(mask))):
        if batch % count:
            raise ValueError(f"{name} holds {count} pictures for a batch of {batch} images: pass one, or one for each.")
    return source


def steps_left_out(strength: float, steps: int) -> int:
    """Steps of a schedule before the first that a picture of this strength starts at, as diffusers counts them.

    Raises:
        ValueError: the strength is no number from 0 to 1, or leaves no step.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"strength={strength!r:.100} must be a number from 0 to 1.")
    first = int(max(steps - min(steps * strength, steps), 0))
    if first >= steps:
        raise ValueError(f"{strength=} leaves none of {steps} steps: {1 / steps:.3g} leaves one.")
    return first


def reference_size(image: Any, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size nearest to the shape of a picture, or of the first of several; an array's own."""
    first = image[0] if isinstance(image, list | tuple) and image else image
    if isinstance(first, str | PathLike):
        first = read_picture("image", Path(first))
    if not isinstance(first, Image.Image):
        *_, height, width, channels = 0, 0, 0, *np.shape(first)
        return (width, channels) if height == 3 else (height, width)
    return min(sizes, key=lambda size: (abs(first.width / first.height - size[1] / size[0]), size[1], size[0]))


def _is_latent(image: Any, channels: int) -> bool:
    shape = getattr(image, "shape", ())
    return len(shape) == 4 and shape[1] == channels


def _pictures(name: str, given: Any, size: tuple[int, int], mode: str) -> Float[np.ndarray, "n H W C"]:
    """In [0, 1]. Pillow's images are resized as diffusers does; arrays must have the size."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    parts = [_picture(name, part, size, mode) for part in (given if several else [given])]
    if not parts:
        raise ValueError(f"{name} is an empty list: pass a picture, or None.")
    return np.concatenate(parts)


def _picture(name: str, given: Any, size: tuple[int, int], mode: str) -> Float[np.ndarray, "n H W C"]:
    if isinstance(given, str | PathLike):
        given = read_picture(name, Path(given))
    if isinstance(given, Image.Image):
        given = given if given.mode in ("RGB", "L") else given.convert(mode)  # a palette has no colours between two
        resized = given.resize((size[1], size[0]), Image.Resampling.LANCZOS).convert(mode)
        return (np.asarray(resized, np.float32) / 255).reshape(1, *size, len(mode) if mode != "L" else 1)
    is_tensor = hasattr(given, "detach")  # torch's have channels first
    array = host_array(name, given)
    is_bytes = array.dtype == np.uint8
    array = np.asarray(array, np.float32) / (255 if is_bytes else 1)
    channels = 3 if mode == "RGB" else 1
    if mode == "L" and array.shape[-2:] == size and array.shape[-3:-2] in ((), (1,)) and array.ndim < 4:
        array = array.reshape(-1, *size, 1)
    if is_tensor and array.ndim in (3, 4) and array.shape[-3] == channels:
        array = np.moveaxis(array, -3, -1)
    array = array if array.ndim == 4 else array[None]
    if array.shape[1:] != (*size, channels):
        want = [*size, channels]
        raise ValueError(
            f"{name} is an array of {list(array.shape[1:])}, and the call's images are {want}: resize it, or pass a "
            "picture of Pillow's, which is resized."
        )
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"{name} goes from {array.min():g} to {array.max():g}: numbers must be from 0 to 1, or uint8.")
    return array


def read_picture(name: str, path: Path) -> Image.Image:
    """A picture of a file, turned as its camera was held.

    Raises:
        ValueError: the file is no picture.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image.convert("RGB") if image.mode == "P" else image)
    except FileNotFoundError as error:
        raise ValueError(f"{name}={str(path)!r} is not there.") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}={str(path)!r} is no picture: {error!s:.200}") from error
