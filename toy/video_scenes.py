"""Captions of moving shapes and the videos they describe, drawn at any resolution on the device.

A caption is "a red star moves slowly left on a blue background". One of two objects says "a red star moves slowly left
and a green ring moves quickly right", and then the background. Both move along one axis, each in its own half of the
frame, so that they never meet. What a caption leaves open is drawn from a random key: exact path and size, which half,
shades.

Colours, shapes and lengths are those of `toy.scenes`. A speed is a length per video, however many frames it has.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toy.scenes import COLOUR_TABLE, COLOURS, HELD_OUT, MAX_OBJECT_SHADE, SHAPES, backdrop, opacity, per_image

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Steps in x, which grows to the right, and in y, which grows downwards."""


class Travel(NamedTuple):
    """How far an object moves in a video: the middle, and how far from it a seed may move that.

    free: how far the middle of a single object's path may lie from the middle of the frame.
    """

    length: float
    jitter: float
    free: float


SPEEDS = {"slowly": Travel(0.17, 0.03, 0.12), "quickly": Travel(0.44, 0.04, 0.02)}
LANES, LANE_JITTER = (0.25, 0.75), 0.01
"""Where the paths of two objects lie across their axis."""
SINGLE_JITTER = 0.16
"""How far from the middle a single object's path lies, at most."""
RADII = ((0.18, 0.02), (0.18, 0.015))
"""Middle and jitter of the radius of a single object, and of two."""

NUMBERS = 10
"""Background; colour, shape, direction and speed of both things; number of things."""
DIRECTION_TABLE = np.array(list(DIRECTIONS.values()), np.float32)
TRAVEL_TABLE = np.array(list(SPEEDS.values()), np.float32)
RADIUS_TABLE = np.array(RADII, np.float32)


class Mover(NamedTuple):
    """An object as a caption names it."""

    colour: str
    shape: str
    direction: str
    speed: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.speed} {self.direction}"


@dataclass(frozen=True)
class MovingScene:
    movers: tuple[Mover, ...]
    background: str

    @property
    def caption(self) -> str:
        return f"{' and '.join(map(str, self.movers))} on a {self.background} background"


def moving_scene(numbers: np.ndarray) -> MovingScene:
    """The scene of a row of `number_table`."""
    names = COLOURS, SHAPES, tuple(DIRECTIONS), tuple(SPEEDS)
    background, things, count = numbers[0], numbers[1:9].reshape(2, 4), numbers[9]
    movers = (Mover(*(table[i] for table, i in zip(names, thing, strict=True))) for thing in things[:count])
    return MovingScene(tuple(movers), COLOURS[background])


@cache
def number_table() -> np.ndarray:
    """Every scene in numbers, [scenes, NUMBERS]: single things, then ordered pairs of three different colours."""
    kinds = len(COLOURS), len(COLOURS), len(SHAPES), len(DIRECTIONS), len(SPEEDS)
    singles = np.indices(kinds).reshape(5, -1).T
    singles = singles[singles[:, 0] != singles[:, 1]]
    singles = np.concatenate([singles, np.zeros((len(singles), 4), int), np.ones((len(singles), 1), int)], axis=1)

    pairs = np.indices((*kinds, *kinds[1:])).reshape(9, -1).T
    background, first, second = pairs[:, 0], pairs[:, 1], pairs[:, 5]
    different = (background != first) & (background != second) & (first != second)
    pairs = pairs[different & (pairs[:, 3] // 2 == pairs[:, 7] // 2)]  # along one axis: left, right or up, down
    pairs = np.concatenate([pairs, np.full((len(pairs), 1), 2)], axis=1)
    return np.concatenate([singles, pairs]).astype(np.int32)


@cache
def split() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `number_table`: single things to train on, pairs to train on, and the held-out half and half.

    Captions are held out, those with the smallest hashes. Of a pair, the converse caption is trained on.
    """
    table = number_table()
    hashes = np.array([hashlib.sha256(row.astype("<i4").tobytes()).digest()[:8] for row in table]).view(">u8")
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    single = table[order, 9] == 1
    singles, pairs = order[single], order[~single]
    held_out = np.stack([singles[:HELD_OUT], pairs[:HELD_OUT]], axis=1).ravel()
    return np.sort(singles[HELD_OUT:]), np.sort(pairs[HELD_OUT:]), held_out


def held_out() -> list[MovingScene]:
    """Scenes never trained on, single things and pairs in turn."""
    return [moving_scene(row) for row in number_table()[split()[2]]]


def words() -> list[str]:
    """The words of all captions."""
    tables = COLOURS, SHAPES, DIRECTIONS, SPEEDS, ("a", "moves", "and", "on", "background")
    return sorted({word for table in tables for word in table})


def path(thing: jax.Array, two: jax.Array, lane: jax.Array, moved: jax.Array, time: jax.Array) -> jax.Array:
    """Centres [B, F, 2] of an object at times in [0, 1].

    Args:
        thing: colour, shape, direction and speed, [B, 4].
        two: whether the object has another beside it, [B]. `lane` is its half of the frame then, 0 or 1.
        moved: what a seed decides, [B, 3] in [-1, 1].
    """
    towards, travel = jnp.asarray(DIRECTION_TABLE)[thing[:, 2]], jnp.asarray(TRAVEL_TABLE)[thing[:, 3]]
    length = travel[:, 0] + travel[:, 1] * moved[:, 0]
    along = 0.5 + travel[:, 2] * moved[:, 1]
    lanes = jnp.asarray(LANES, jnp.float32)[lane] + LANE_JITTER * moved[:, 2]
    across = jnp.where(two, lanes, 0.5 + SINGLE_JITTER * moved[:, 2])
    horizontal = towards[:, 0] != 0
    middle = jnp.stack([jnp.where(horizontal, along, across), jnp.where(horizontal, across, along)], axis=1)
    return middle[:, None] + (length[:, None] * towards)[:, None] * (time - 0.5)[None, :, None]


def draw(numbers: jax.Array, key: jax.Array, size: int, frames: int) -> jax.Array:
    """Videos [B, frames, size, size, 3] in [0, 1] of rows of `number_table`, [B, NUMBERS]."""
    batch = numbers.shape[0]
    jitter = jax.random.uniform(key, (batch, 14), minval=-1.0, maxval=1.0)
    time = jnp.asarray(np.linspace(0, 1, frames, dtype=np.float32))
    two, swapped = numbers[:, 9] == 2, (jitter[:, 3] > 0).astype(numbers.dtype)
    reach = jnp.asarray(RADIUS_TABLE)[numbers[:, 9] - 1]

    def of_frames(values: jax.Array) -> jax.Array:
        return jnp.repeat(values, frames, axis=0)

    video = of_frames(backdrop(numbers[:, 0], jitter[:, :3], size))
    for index in range(2):
        thing, moved = numbers[:, 1 + 4 * index : 5 + 4 * index], jitter[:, 4 + 5 * index : 9 + 5 * index]
        centres = path(thing, two, index ^ swapped, moved[:, :3], time).reshape(batch * frames, 2)
        radius = reach[:, 0] + reach[:, 1] * moved[:, 3]
        alpha = opacity(of_frames(thing[:, 1]), centres, of_frames(radius), size)
        alpha = jnp.where(per_image(of_frames(numbers[:, 9] > index)), alpha, 0.0)[..., None]
        paint = jnp.asarray(COLOUR_TABLE)[thing[:, 0]] + MAX_OBJECT_SHADE * moved[:, 4:5]
        video = video * (1 - alpha) + of_frames(paint)[:, None, None, :] * alpha
    return jnp.clip(video, 0.0, 1.0).reshape(batch, frames, size, size, 3)
