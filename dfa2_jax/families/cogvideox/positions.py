"""CogVideoX's positions: a table of sines for the 2B model, rotary ones for the others."""

import numpy as np
from jaxtyping import Float

from dfa2_jax.families.cogvideox.config import CogVideoXConfig
from dfa2_jax.sampling.tokens import Grid

Rope = tuple[Float[np.ndarray, "S half"], Float[np.ndarray, "S half"]]


def check_grid(config: CogVideoXConfig, grid: Grid) -> None:
    """Raises ValueError where CogVideoX 1.5 has no positions for so many rows or columns."""
    if config.patch_size_t is None:
        return
    most = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    if grid.rows > most[0] or grid.columns > most[1]:
        raise ValueError(
            f"{grid.rows} x {grid.columns} tokens exceed the model's {most[0]} x {most[1]} (config.json: "
            f"sample_height={config.sample_height}, sample_width={config.sample_width}): ask for a smaller size."
        )


def position_table(config: CogVideoXConfig, grid: Grid) -> Float[np.ndarray, "V D"]:
    """Sines and cosines that the 2B model adds to visual tokens; a quarter of the width is time, the rest the place."""
    over_time, over_place = config.width // 4, 3 * config.width // 8
    scale, time_scale = np.float32(config.spatial_interpolation_scale), np.float32(config.temporal_interpolation_scale)
    frames = _sines(np.arange(grid.frames, dtype=np.float32) / time_scale, over_time)
    rows, columns = (_sines(np.arange(n, dtype=np.float32) / scale, over_place) for n in (grid.rows, grid.columns))
    shape = grid.frames, grid.rows, grid.columns
    parts = frames[:, None, None], columns[None, None], rows[None, :, None]
    return np.concatenate([np.broadcast_to(x, (*shape, x.shape[-1])) for x in parts], -1).reshape(-1, config.width)


def _sines(positions: Float[np.ndarray, " n"], width: int) -> Float[np.ndarray, "n {width}"]:
    """[sines, cosines], of angles in float64."""
    frequencies = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2.0))
    angles = np.outer(positions.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def rope_table(config: CogVideoXConfig, num_text: int, grid: Grid) -> Rope:
    """(cos, sin), float32: text tokens are not rotated; a quarter of the pairs is time, the rest rows and columns.

    Angles in float32, as diffusers has them for this model.
    """
    if config.patch_size_t is None:
        rows, columns = _centred(config, grid)
    else:
        rows, columns = (np.arange(n, dtype=np.float32) for n in (grid.rows, grid.columns))
    frames, dim = np.arange(grid.frames, dtype=np.float32), config.attention_head_dim
    sizes = dim // 4, dim // 8 * 3, dim // 8 * 3
    over_time, over_rows, over_columns = map(_angles, (frames, rows, columns), sizes)
    shape = grid.frames, grid.rows, grid.columns
    parts = over_time[:, None, None], over_rows[None, :, None], over_columns[None, None]
    visual = np.concatenate([np.broadcast_to(x, (*shape, x.shape[-1])) for x in parts], -1).reshape(-1, dim // 2)
    angles = np.concatenate([np.zeros((num_text, dim // 2), np.float32), visual]).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _angles(positions: Float[np.ndarray, " n"], dim: int) -> Float[np.ndarray, "n half"]:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.outer(positions, np.float32(1) / np.float32(10000) ** exponents).astype(np.float32)


def _centred(config: CogVideoXConfig, grid: Grid) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " columns"]]:
    """Rows and columns of the trained size that a video of another size covers, from the middle of it."""
    height, width = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    if grid.rows / grid.columns > height / width:
        rows, columns = height, round(height / grid.rows * grid.columns)
    else:
        rows, columns = round(width / grid.columns * grid.rows), width
    places = []
    for covered, trained, count in ((rows, height, grid.rows), (columns, width, grid.columns)):
        first = round((trained - covered) / 2.0)
        last = (first + covered) * (count - 1) / count
        places.append(np.linspace(np.float32(first), np.float32(last), count, dtype=np.float32))
    return places[0], places[1]
