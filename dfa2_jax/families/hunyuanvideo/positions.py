"""HunyuanVideo's positions: rotary, of patches alone."""

import numpy as np
from jaxtyping import Float

from dfa2_jax.families.hunyuanvideo.config import HunyuanVideoConfig
from dfa2_jax.sampling.tokens import Grid


def rope_table(
    config: HunyuanVideoConfig, grid: Grid, num_text: int
) -> tuple[Float[np.ndarray, "S half"], Float[np.ndarray, "S half"]]:
    """(cos, sin), float32: patches at (frame, row, column), then text, which is not rotated.

    Angles in float32, as diffusers has them for this model.
    """
    ids = np.indices((grid.frames, grid.rows, grid.columns)).reshape(3, -1).T.astype(np.float32)
    angles = []
    for axis, dim in enumerate(config.rope_axes_dim):
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        frequencies = np.float32(1) / np.power(np.float32(config.rope_theta), exponents)
        angles.append(ids[:, axis, None] * frequencies.astype(np.float32))
    visual = np.concatenate(angles, axis=1).astype(np.float64)
    table = np.concatenate([visual, np.zeros((num_text, visual.shape[1]))])
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)
