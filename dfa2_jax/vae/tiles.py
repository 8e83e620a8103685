"""Tiles of pixels that images and videos are decoded in, as those of diffusers' autoencoders.

A tile overlaps the one above and the one on its left, and is blended into them. Each tile is decoded for itself: its
norms see the tile alone, so that other pixels come out than of the whole.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Axis:
    """One direction. size: latents of a tile; step: latents from a tile to the next; blended: pixels of the overlap."""

    size: int
    step: int
    blended: int

    @classmethod
    def meeting(cls, pixels: int, overlap: float, scale: int, what: str) -> "Axis":
        """Tiles of so many pixels, of which a share is blended.

        Args:
            what: the tiles are of, in words.

        Raises:
            ValueError: they do not meet.
        """
        axis = cls(pixels // scale, int(pixels // scale * (1 - overlap)), int(pixels * overlap))
        if axis.step < 1 or axis.step * scale + axis.blended != pixels:
            raise ValueError(
                f"vae_tiling: tiles of {what} with {axis.blended} pixels of overlap do not meet at a multiple of "
                f"{scale} pixels: leave vae_tiling out."
            )
        return axis

    def parts(self, length: int) -> list[slice]:
        """Latents of each tile; the last is as long as what is left."""
        return [slice(start, min(start + self.size, length)) for start in range(0, length, self.step)]


@dataclass(frozen=True)
class Tiles:
    """Where tiles lie, and how they are put together. scale: pixels along a side of one latent pixel."""

    rows: Axis
    columns: Axis
    scale: int

    @property
    def of_latents(self) -> "Tiles":
        """The same where latents are put together, as an encoder makes them."""
        rows, columns = (replace(axis, blended=axis.blended // self.scale) for axis in (self.rows, self.columns))
        return Tiles(rows, columns, 1)

    def parts(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """Rows and columns of latents of each tile, in reading order; one tile of what fits in it."""
        if height <= self.rows.size and width <= self.columns.size:
            return [(slice(0, height), slice(0, width))]
        return [(rows, columns) for rows in self.rows.parts(height) for columns in self.columns.parts(width)]


class Canvas:
    """Frames of a chunk, put together of tiles that come in reading order."""

    def __init__(self, tiles: Tiles, frames: int, height: int, width: int, channels: int = 3):
        """
        Args:
            height, width: of the latents.
        """
        self.tiles = tiles
        self.pixels = np.empty((frames, height * tiles.scale, width * tiles.scale, channels), np.float32)
        self._blended: dict[tuple[int, int], np.ndarray] = {}

    def put(self, part: tuple[slice, slice], tile: Float[np.ndarray, "F y x C"]) -> None:
        """A tile, blended from the tile above it, then from the left one, both as they were blended."""
        (rows, columns), (down, across), scale = part, (self.tiles.rows, self.tiles.columns), self.tiles.scale
        top, left = rows.start, columns.start
        if top:
            tile = blend(self._blended.pop((top - down.step, left)), tile, down.blended, axis=1)
        if left:
            tile = blend(self._blended[top, left - across.step], tile, across.blended, axis=2)
        self._blended[top, left] = tile
        tile = tile[:, : down.step * scale, : across.step * scale]
        self.pixels[:, top * scale :, left * scale :][:, : tile.shape[1], : tile.shape[2]] = tile


def blend(
    before: Float[np.ndarray, "E a b C"], after: Float[np.ndarray, "F y x C"], extent: int, *, axis: int
) -> Float[np.ndarray, "F y x C"]:
    """A tile that begins as the end of the tile before, and goes over into itself within `extent` pixels, or frames."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    weight = (np.arange(extent) / extent).astype(np.float32)
    weight = np.expand_dims(weight, [other for other in range(4) if other != axis])
    end = np.take(before, range(before.shape[axis] - extent, before.shape[axis]), axis)
    begin, rest = np.split(after, [extent], axis)
    return np.concatenate([end * (1 - weight) + begin * weight, rest], axis)
