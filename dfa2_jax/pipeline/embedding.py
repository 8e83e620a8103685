"""Both sides of the guidance as embeddings of every image."""

import jax
import numpy as np

from dfa2_jax.families.base import Embeddings
from dfa2_jax.pipeline.loaded import Loaded
from dfa2_jax.pipeline.request import Request


def embed(pipeline: Loaded, request: Request) -> Embeddings:
    """[unconditional, conditional] embeddings of every image, in the transformer's dtype."""
    sides = [request.positive] if request.negative is None else [request.negative, request.positive]
    embedded = []
    for prompts in sides:
        side = prompts.embeddings
        if side is None:
            assert prompts.texts is not None
            skip = request.clip_skip if prompts is request.positive else 0  # diffusers leaves the negative as it is
            side = pipeline.encode_prompt(prompts.texts, max_sequence_length=request.length, clip_skip=skip)
        embedded.append(jax.tree.map(lambda x: np.repeat(x, request.images_per_prompt, axis=0), side))
    most = max(side.text.shape[1] for side in embedded)
    embedded = [side.padded(most) for side in embedded]
    shapes = [side.text.shape for side in embedded]
    if len(set(shapes)) > 1:
        raise ValueError(f"Negative and positive prompt embeddings differ in shape: {shapes[0]} and {shapes[1]}.")
    both = jax.tree.map(lambda *x: np.concatenate(x), *embedded)
    return jax.tree.map(lambda x: x if np.issubdtype(x.dtype, np.integer) else x.astype(pipeline.dtype), both)
