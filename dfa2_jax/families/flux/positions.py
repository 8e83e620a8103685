"""FLUX's positions: rotary, of text and patches."""

import numpy as np
from jaxtyping import Float


def rope_table(
    axes: tuple[int, ...], num_text: int, rows: int, columns: int, reference: tuple[int, int] = (0, 0)
) -> tuple[Float[np.ndarray, "S half"], Float[np.ndarray, "S half"]]:
    """FLUX's (cos, sin), float32: text tokens at position (0, 0, 0), patches at (0, row, column); theta 10000.

    Between them lie the rows and columns of a reference, at (1, row, column).

    Angles in float64 on the host, as diffusers computes them: float32 loses the phase of far patches.
    """
    patches = [np.indices(sides).reshape(2, -1).T for sides in (reference, (rows, columns))]
    ids = np.zeros((num_text + sum(map(len, patches)), 3))
    ids[num_text:, 1:] = np.concatenate(patches)
    ids[num_text : num_text + len(patches[0]), 0] = 1
    angles = [ids[:, axis, None] / 10000.0 ** (np.arange(0, dim, 2) / dim) for axis, dim in enumerate(axes)]
    table = np.concatenate(angles, axis=1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)
