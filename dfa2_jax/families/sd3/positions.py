"""SD3's positions: a stored table, cropped to the image."""

import numpy as np
from jaxtyping import Float


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
