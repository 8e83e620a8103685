"""Captions and the scenes they describe, drawn at any resolution on the device.

"a large red circle on the left of a blue background", or "a red circle left of a green star on a white background".
What a caption leaves open (exact place and size, shades, the background's gradient) is drawn from a random key.
Lengths are fractions of the image's side; x grows to the right and y downwards.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PALETTE = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.12, 0.22, 0.88),
    "yellow": (0.93, 0.84, 0.12),
    "purple": (0.56, 0.14, 0.68),
    "cyan": (0.12, 0.80, 0.86),
    "white": (0.93, 0.93, 0.93),
    "black": (0.08, 0.08, 0.08),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RELATIONS = ("left of", "right of", "above", "below")


class Slot(NamedTuple):
    """Where an object may lie: its centre and how far from it a seed may move it."""

    x: float
    y: float
    jitter_x: float
    jitter_y: float


SLOTS = {
    "on the left": Slot(0.28, 0.50, 0.04, 0.04),
    "on the right": Slot(0.72, 0.50, 0.04, 0.04),
    "at the top": Slot(0.50, 0.28, 0.04, 0.04),
    "at the bottom": Slot(0.50, 0.72, 0.04, 0.04),
    "in the centre": Slot(0.50, 0.50, 0.04, 0.04),
    # of two objects
    "left of": Slot(0.27, 0.50, 0.04, 0.10),
    "right of": Slot(0.73, 0.50, 0.04, 0.10),
    "above": Slot(0.50, 0.27, 0.10, 0.04),
    "below": Slot(0.50, 0.73, 0.10, 0.04),
}
PLACES = tuple(name for name in SLOTS if name not in RELATIONS)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

RADII = {"small": (0.12, 0.012), "large": (0.20, 0.015), "": (0.15, 0.02)}
"""The radius of an object of each size: the middle, and how far from it a seed may move it. "" is that of two
objects."""

SLOT_TABLE = np.array(list(SLOTS.values()), np.float32)
RADIUS_TABLE = np.array(list(RADII.values()), np.float32)
COLOUR_TABLE = np.array(list(PALETTE.values()), np.float32)

MAX_OBJECT_SHADE, MAX_BACKGROUND_SHADE, MAX_GRADIENT = 0.05, 0.04, 0.22
HELD_OUT = 100
"""Captions of either kind that are never trained on: those with the smallest hashes."""


@dataclass(frozen=True)
class Thing:
    """An object as a caption names it."""

    colour: str
    shape: str
    slot: str
    size: str = ""


@dataclass(frozen=True)
class Scene:
    """One thing at a place, or two in a relation, and the background's colour."""

    things: tuple[Thing, ...]
    background: str

    @property
    def caption(self) -> str:
        first, *others = self.things
        if not others:
            what = f"a {first.size} {first.colour} {first.shape} {first.slot} of"
        else:
            what = f"a {first.colour} {first.shape} {first.slot} a {others[0].colour} {others[0].shape} on"
        return f"{what} a {self.background} background"

    def numbers(self) -> list[int]:
        """Background, then colour, shape, slot, radius and presence of both things, as indices into the tables."""
        indices = [COLOURS.index(self.background)]
        for thing in (*self.things, self.things[0])[:2]:
            indices += [COLOURS.index(thing.colour), SHAPES.index(thing.shape)]
            indices += [list(SLOTS).index(thing.slot), list(RADII).index(thing.size)]
        return [*indices, len(self.things)]


@cache
def scenes() -> tuple[Scene, ...]:
    """Every scene that has a caption."""
    singles = [
        Scene((Thing(colour, shape, place, size),), background)
        for size, colour, shape, place, background in product(("small", "large"), COLOURS, SHAPES, PLACES, COLOURS)
        if colour != background
    ]
    pairs = [
        Scene((Thing(a, shape_a, relation), Thing(b, shape_b, OPPOSITE[relation])), background)
        for a, shape_a, relation, b, shape_b, background in product(
            COLOURS, SHAPES, RELATIONS, COLOURS, SHAPES, COLOURS
        )
        if len({a, b, background}) == 3
    ]
    return (*singles, *pairs)


@cache
def split() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices into `scenes()`: single things to train on, pairs to train on, and the held-out half and half.

    Captions are held out, not scenes: of a pair that is left of another, the converse caption is trained on.
    """
    every = scenes()
    order = sorted(range(len(every)), key=lambda i: hashlib.sha256(every[i].caption.encode()).digest())
    singles = np.array([i for i in order if len(every[i].things) == 1], np.int32)
    pairs = np.array([i for i in order if len(every[i].things) == 2], np.int32)
    held_out = np.stack([singles[:HELD_OUT], pairs[:HELD_OUT]], axis=1).ravel()
    return np.sort(singles[HELD_OUT:]), np.sort(pairs[HELD_OUT:]), held_out


def held_out() -> list[Scene]:
    """Scenes never trained on, single things and pairs in turn."""
    return [scenes()[i] for i in split()[2]]


def signed_distances(x: Any, y: Any, radius: Any, xp: ModuleType = jnp) -> list[Any]:
    """Distances of points, relative to the centre, to every shape's edge: negative inside, and exact near the edge.

    Every shape's centre of mass is its centre, so that the checker can find it.
    """
    length = xp.sqrt(x * x + y * y)
    triangle = xp.maximum(y, xp.abs(x) * (math.sqrt(3) / 2) - y * 0.5) - 0.60 * radius

    # One tenth of a star, mirrored and turned: an edge runs from the tip (0, outer) to the notch at 36 degrees.
    outer, notch = 1.15, 0.55
    turn = 2 * math.pi / 5
    angle = xp.arctan2(x, -y)
    angle = xp.abs(angle - turn * xp.round(angle / turn))
    across, along = length * xp.sin(angle), length * xp.cos(angle)
    edge_x, edge_y = notch * math.sin(turn / 2), notch * math.cos(turn / 2) - outer
    norm = math.hypot(edge_x, edge_y)
    star = (across * (-edge_y / norm)) + (along - outer * radius) * (edge_x / norm)

    ax, ay = xp.abs(x), xp.abs(y)
    bars = xp.minimum(
        xp.maximum(ax - radius, ay - 0.34 * radius),
        xp.maximum(ay - radius, ax - 0.34 * radius),
    )
    return [
        length - radius,
        xp.maximum(ax, ay) - 0.84 * radius,
        triangle,
        star,
        bars,
        xp.abs(length - 0.76 * radius) - 0.24 * radius,
    ]


def pixel_centres(size: int) -> np.ndarray:
    return (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)


def coverage(distance: Any, size: int, xp: ModuleType = jnp) -> Any:
    """How much of a pixel lies inside: the edge is as wide as a pixel."""
    return xp.clip(0.5 - distance * size, 0.0, 1.0)


def per_image(values: Any) -> Any:
    """[B] beside pixels."""
    return values[:, None, None]


def backdrop(colour: jax.Array, jitter: jax.Array, size: int) -> jax.Array:
    """Images [B, size, size, 3] of a colour each, shaded by `jitter` [B, 3]: a gradient's angle and slope, a shade."""
    x, y = jnp.asarray(pixel_centres(size))[None, None, :], jnp.asarray(pixel_centres(size))[None, :, None]
    angle, steep = per_image(jitter[:, 0] * math.pi), per_image(MAX_GRADIENT * jitter[:, 1])
    slope = steep * (jnp.cos(angle) * (x - 0.5) + jnp.sin(angle) * (y - 0.5))
    shade = slope + per_image(MAX_BACKGROUND_SHADE * jitter[:, 2])
    return jnp.asarray(COLOUR_TABLE)[colour][:, None, None, :] + shade[..., None]


def opacity(shape: jax.Array, centre: jax.Array, reach: jax.Array, size: int) -> jax.Array:
    """How much of each pixel an object covers, [B, size, size]; `centre` [B, 2], all else [B]."""
    x, y = jnp.asarray(pixel_centres(size))[None, None, :], jnp.asarray(pixel_centres(size))[None, :, None]
    distances = signed_distances(x - per_image(centre[:, 0]), y - per_image(centre[:, 1]), per_image(reach))
    distance = sum(jnp.where(per_image(shape) == i, edge, jnp.zeros_like(edge)) for i, edge in enumerate(distances))
    return coverage(distance, size)


def draw(numbers: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """Images [B, size, size, 3] in [0, 1] of scenes given by `Scene.numbers`, [B, 10]."""
    batch = numbers.shape[0]
    jitter = jax.random.uniform(key, (batch, 13), minval=-1.0, maxval=1.0)
    colours, slots, radii = jnp.asarray(COLOUR_TABLE), jnp.asarray(SLOT_TABLE), jnp.asarray(RADIUS_TABLE)
    image = backdrop(numbers[:, 0], jitter[:, :3], size)
    for thing, first in ((0, 1), (1, 5)):
        colour, shape, slot, radius = (numbers[:, first + i] for i in range(4))
        moved = jitter[:, 3 + 5 * thing : 8 + 5 * thing]
        centre = slots[slot, :2] + slots[slot, 2:] * moved[:, :2]
        reach = radii[radius, 0] + radii[radius, 1] * moved[:, 2]
        present = per_image(numbers[:, 9] > thing)
        alpha = jnp.where(present, opacity(shape, centre, reach, size), 0.0)[..., None]
        paint = colours[colour] + MAX_OBJECT_SHADE * moved[:, 3:4]
        image = image * (1 - alpha) + paint[:, None, None, :] * alpha
    return jnp.clip(image, 0.0, 1.0)


@cache
def number_table() -> np.ndarray:
    """`Scene.numbers` of every scene, [scenes, 10]."""
    return np.array([scene.numbers() for scene in scenes()], np.int32)
