"""The order of visual tokens: latents to tokens and back, and the position tables that go with that order.

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

    def pack(self, latents: Float[np.ndarray, "B C F h w"]) -> Float[np.ndarray, "B V P"]: ...

    def unpack(self, tokens: Float[np.ndarray, "B V P"], grid: Grid) -> Float[np.ndarray, "B C F h w"]: ...


@dataclass(frozen=True)
class Patches:
    """Squares of `patch` x `patch` latent pixels, of one frame."""

    patch: int
    order: tuple[int, int, int]

    def pack(self, latents: Float[np.ndarray, "B C 1 h w"]) -> Float[np.ndarray, "B V P"]:
        return patchify(latents[:, :, 0], self.patch, self.order)

    def unpack(self, tokens: Float[np.ndarray, "B V P"], grid: Grid) -> Float[np.ndarray, "B C 1 h w"]:
        return unpatchify(tokens, self.patch, self.order, grid.rows, grid.columns)[:, :, None]


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


def crop_positions(table: Float[np.ndarray, "cells D"], rows: int, columns: int) -> Float[np.ndarray, "1 V D"]:
    """The centre `rows` x `columns` patches of SD3's square position table (diffusers `cropped_pos_embed`).

    Raises:
        ValueError: the image has more patches than the table.
    """
    size = int(len(table) ** 0.5)
    if max(rows, columns) > size:
        raise ValueError(
            f"{rows} x {columns} patches exceed the position table of {size} x {size}: use a smaller image."
        )
    top, left = (size - rows) // 2, (size - columns) // 2
    grid = np.asarray(table).reshape(size, size, -1)[top : top + rows, left : left + columns]
    return grid.reshape(1, rows * columns, -1)


def rope_table(
    axes: tuple[int, ...], num_text: int, rows: int, columns: int
) -> tuple[Float[np.ndarray, "S half"], Float[np.ndarray, "S half"]]:
    """FLUX's (cos, sin), float32: text tokens at position (0, 0, 0), patches at (0, row, column); theta 10000.

    Angles in float64 on the host, as diffusers computes them: float32 loses the phase of far patches.
    """
    ids = np.zeros((num_text + rows * columns, 3))
    ids[num_text:, 1:] = np.indices((rows, columns)).reshape(2, -1).T
    angles = [ids[:, axis, None] / 10000.0 ** (np.arange(0, dim, 2) / dim) for axis, dim in enumerate(axes)]
    table = np.concatenate(angles, axis=1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)
