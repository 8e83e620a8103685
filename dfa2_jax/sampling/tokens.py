"""The order of visual tokens: latents to tokens and back.

Everything here is row-major over patches. A permutation of visual tokens belongs in this file alone.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

ROW_COLUMN_CHANNEL, CHANNEL_ROW_COLUMN = (3, 5, 1), (1, 3, 5)
"""Order of numbers inside a token, as axes of [B, C, rows, row, columns, column]: SD3's and FLUX's."""


@dataclass(frozen=True)
class Grid:
    """Visual tokens of a picture or a video."""

    frames: int
    rows: int
    columns: int

    @property
    def num_visual(self) -> int:
        return self.frames * self.rows * self.columns


class Tokens(Protocol):
    """How latents [B, C, F, h, w] become tokens [B, V, P], and back."""

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """The grid of latents of this size, in latent frames and pixels."""
        ...

    def noise_shape(self, channels: int, grid: Grid) -> tuple[int, ...]:
        """The shape in which diffusers draws the noise of an image or a video."""
        ...

    def pack_noise(self, noise: Float[np.ndarray, "B ..."]) -> Float[np.ndarray, "B V P"]: ...

    def pack(self, latents: Float[np.ndarray, "B C F h w"]) -> Float[np.ndarray, "B V P"]: ...

    def unpack(self, tokens: Float[np.ndarray, "B V P"], grid: Grid) -> Float[np.ndarray, "B C F h w"]: ...


@dataclass(frozen=True)
class Patches:
    """Squares of `patch` x `patch` latent pixels, of one frame."""

    patch: int
    order: tuple[int, int, int]

    def grid(self, frames: int, height: int, width: int) -> Grid:
        return Grid(frames, height // self.patch, width // self.patch)

    def noise_shape(self, channels: int, grid: Grid) -> tuple[int, ...]:
        return channels, grid.rows * self.patch, grid.columns * self.patch

    def pack_noise(self, noise: Float[np.ndarray, "B C h w"]) -> Float[np.ndarray, "B V P"]:
        return patchify(noise, self.patch, self.order)

    def pack(self, latents: Float[np.ndarray, "B C 1 h w"]) -> Float[np.ndarray, "B V P"]:
        return patchify(latents[:, :, 0], self.patch, self.order)

    def unpack(self, tokens: Float[np.ndarray, "B V P"], grid: Grid) -> Float[np.ndarray, "B C 1 h w"]:
        return unpatchify(tokens, self.patch, self.order, grid.rows, grid.columns)[:, :, None]


@dataclass(frozen=True)
class VideoPatches:
    """Boxes of `frames` latent frames, `patch` rows and as many columns; inside a token channels come first.

    Tokens run over frames, rows and columns. Frames are as many as the boxes of a grid hold.

    frames_first: diffusers draws noise with frames before channels.
    """

    patch: int
    frames: int = 1
    frames_first: bool = True

    def grid(self, frames: int, height: int, width: int) -> Grid:
        return Grid(-(-frames // self.frames), height // self.patch, width // self.patch)

    def noise_shape(self, channels: int, grid: Grid) -> tuple[int, ...]:
        frames, sides = grid.frames * self.frames, (grid.rows * self.patch, grid.columns * self.patch)
        return (frames, channels, *sides) if self.frames_first else (channels, frames, *sides)

    def pack_noise(self, noise: Float[np.ndarray, "B _ _ h w"]) -> Float[np.ndarray, "B V P"]:
        return self.pack(noise.swapaxes(1, 2) if self.frames_first else noise)

    def pack(self, latents: Float[np.ndarray, "B C F h w"]) -> Float[np.ndarray, "B V P"]:
        (batch, channels, frames, height, width), p, t = latents.shape, self.patch, self.frames
        boxes = latents.reshape(batch, channels, frames // t, t, height // p, p, width // p, p)
        return boxes.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * t * p * p)

    def unpack(self, tokens: Float[np.ndarray, "B V P"], grid: Grid) -> Float[np.ndarray, "B C F h w"]:
        (batch, _, width), p, t = tokens.shape, self.patch, self.frames
        boxes = tokens.reshape(batch, grid.frames, grid.rows, grid.columns, width // (t * p * p), t, p, p)
        boxes = boxes.transpose(0, 4, 1, 5, 2, 6, 3, 7)
        return boxes.reshape(batch, boxes.shape[1], grid.frames * t, grid.rows * p, grid.columns * p)


def patchify(latents: Float[np.ndarray, "B C h w"], patch: int, order: tuple[int, ...]) -> Float[np.ndarray, "B V P"]:
    """Latents as tokens of `patch` x `patch` latent pixels."""
    batch, channels, height, width = latents.shape
    grid = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.transpose(0, 2, 4, *order).reshape(batch, -1, channels * patch**2)


def unpatchify(
    tokens: Float[np.ndarray, "B V P"], patch: int, order: tuple[int, ...], rows: int, columns: int
) -> Float[np.ndarray, "B C h w"]:
    """The inverse of `patchify`, for `rows` x `columns` tokens."""
    batch, channels = tokens.shape[0], tokens.shape[2] // patch**2
    sizes = {1: channels, 3: patch, 5: patch}
    grid = tokens.reshape(batch, rows, columns, *(sizes[axis] for axis in order))
    inverse = np.argsort((0, 2, 4, *order))
    return grid.transpose(*inverse).reshape(batch, channels, rows * patch, columns * patch)
