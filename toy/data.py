"""What the networks train on: drawn scenes and their captions, all made on the device."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from toy import model, scenes
from toy.networks import Setup
from toy.stages import Part

PAIRS = 0.55
"""Share of scenes with two things."""


@cache
def tables() -> dict[str, Any]:
    """Token ids and scene numbers of every caption, the empty one last, and which to train on."""
    singles, pairs, _ = scenes.split()
    ids = model.token_ids([*(scene.caption for scene in scenes.scenes()), ""])
    return {"numbers": scenes.number_table(), "singles": singles, "pairs": pairs, "ids": ids}


def choose(setup: Setup, batch: int, data: dict[str, Any], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of captions to train on, as `tables` counts them, and a key to draw their scenes from."""
    kind, single, pair, picture = jax.random.split(key, 4)
    shape = (batch,)
    singles = jax.random.randint(single, shape, 0, data["singles"].shape[0])
    pairs = jax.random.randint(pair, shape, 0, data["pairs"].shape[0])
    two = jax.random.uniform(kind, shape) < PAIRS
    return setup.spread(jnp.where(two, data["pairs"][pairs], data["singles"][singles])), picture


def draw(setup: Setup, part: Part, data: dict[str, Any], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of captions, as `tables` counts them, and their images in [-1, 1]."""
    captions, picture = choose(setup, part.batch, data, key)
    images = scenes.draw(data["numbers"][captions], picture, part.pixels)
    return captions, setup.spread(images * 2 - 1)
