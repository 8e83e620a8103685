"""What every family of models has: defaults, prompt encoding, token order, timesteps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Encode = Callable[..., Any]
"""`encode(encoder, tokenizer, prompts, length, *args)`: the encoder's output, None if the folder has none."""


class Embeddings(NamedTuple):
    """Text states [B, T, E] and pooled text [B, P]."""

    text: np.ndarray
    pooled: np.ndarray


class Defaults(NamedTuple):
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int


def expect_shape(name: str, x: np.ndarray, want: tuple[int | None, ...]) -> None:
    if x.ndim != len(want) or any(w is not None and w != got for w, got in zip(want, x.shape, strict=True)):
        shown = ["batch" if w is None else w for w in want]
        raise ValueError(f"{name} have shape {list(x.shape)}, but this model and image size need {shown}.")
