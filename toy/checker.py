"""Does an image show its caption? Colours by the nearest of the palette, shapes by overlap with drawn ones.

What a caption does not ask for is not looked for: an object more, of another colour, costs nothing.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from toy.scenes import (
    COLOUR_TABLE,
    COLOURS,
    PLACES,
    RADII,
    SHAPES,
    SLOTS,
    Scene,
    Thing,
    pixel_centres,
    signed_distances,
)

BORDER = 0.06
"""Width of the frame whose colour is the background's: no object reaches it far."""
SMALLEST = 0.004
"""The least share of the image that counts as an object. The smallest drawn, a small ring or star, covers 0.016."""
SLACK = 0.02
"""How far outside the drawn range of places and radii an object may still lie."""


class Score(NamedTuple):
    """Fractions of what a caption asks for, averaged over its things."""

    background: float
    colour: float
    """Things whose colour is right, each at its place."""
    shape: float
    """Things that overlap with the asked shape more than with any other."""
    iou: float
    """Intersection over union with the asked shape."""


def nearest_colours(image: np.ndarray, colours: Sequence[int] = range(len(COLOURS))) -> np.ndarray:
    """Index of each pixel's nearest colour of the palette, or of some of it; `image` [H, W, 3] in [0, 1]."""
    difference = image[:, :, None, :].astype(np.float32) - COLOUR_TABLE[list(colours)]
    return np.array(colours)[np.square(difference).sum(-1).argmin(-1)]


def most_common(labels: np.ndarray) -> int:
    return int(np.bincount(labels, minlength=len(COLOURS)).argmax())


def score(image: np.ndarray, scene: Scene) -> Score:
    """The score of a square image [H, H, 3] in [0, 1]."""
    labels = nearest_colours(image)
    size = len(labels)
    centres = pixel_centres(size)
    frame = np.minimum(centres, 1 - centres) < BORDER
    background = most_common(labels[frame[:, None] | frame[None, :]])
    scores = [thing_score(labels, background, thing) for thing in scene.things]
    colour, shape, iou = (float(np.mean(values)) for values in zip(*scores, strict=True))
    return Score(float(background == COLOURS.index(scene.background)), colour, shape, iou)


def thing_score(labels: np.ndarray, background: int, thing: Thing) -> tuple[float, float, float]:
    """(colour at its place, shape, IoU)."""
    centres = pixel_centres(len(labels))
    region = side(thing.slot, centres)
    foreground = region & (labels != background)
    if foreground.mean() < SMALLEST:
        return 0.0, 0.0, 0.0
    asked = COLOURS.index(thing.colour)
    mask = region & (labels == asked)
    right = most_common(labels[foreground]) == asked and mask.mean() >= SMALLEST
    right = right and (thing.slot not in PLACES or nearest_place(mask, centres) == thing.slot)
    if mask.mean() < SMALLEST or asked == background:
        return float(right), 0.0, 0.0
    overlaps = [overlap(mask, shape, thing, centres) for shape in range(len(SHAPES))]
    wanted = SHAPES.index(thing.shape)
    return float(right), float(np.argmax(overlaps) == wanted), overlaps[wanted]


def side(slot: str, centres: np.ndarray) -> np.ndarray:
    """Where a thing is looked for: its half of the image if there is another, else everywhere."""
    x, y = np.broadcast_arrays(centres[None, :], centres[:, None])
    halves = {"left of": x < 0.5, "right of": x > 0.5, "above": y < 0.5, "below": y > 0.5}
    return halves.get(slot, np.ones(x.shape, bool))


def centre_of_mass(mask: np.ndarray, centres: np.ndarray) -> tuple[float, float]:
    total = mask.sum()
    return float((mask.sum(0) * centres).sum() / total), float((mask.sum(1) * centres).sum() / total)


def nearest_place(mask: np.ndarray, centres: np.ndarray) -> str:
    x, y = centre_of_mass(mask, centres)
    return min(PLACES, key=lambda place: (SLOTS[place].x - x) ** 2 + (SLOTS[place].y - y) ** 2)


@cache
def areas() -> tuple[float, ...]:
    """The area of each shape of radius 1."""
    centres = pixel_centres(800) - np.float32(0.5)
    inside = signed_distances(centres[None, :], centres[:, None], np.float32(0.3), np)
    return tuple(float((distance < 0).mean()) / 0.3**2 for distance in inside)


def overlap(mask: np.ndarray, shape: int, thing: Thing, centres: np.ndarray) -> float:
    """Best IoU of the mask with the shape at the mask's centre, about its size, as far as the caption allows."""
    slot, (middle, jitter) = SLOTS[thing.slot], RADII[thing.size]
    x, y = centre_of_mass(mask, centres)
    x = np.clip(x, slot.x - slot.jitter_x - SLACK, slot.x + slot.jitter_x + SLACK)
    y = np.clip(y, slot.y - slot.jitter_y - SLACK, slot.y + slot.jitter_y + SLACK)
    return best_overlap(mask, shape, x, y, (middle - jitter - SLACK, middle + jitter + SLACK), centres)


def best_overlap(
    mask: np.ndarray, shape: int, x: float, y: float, radii: tuple[float, float], centres: np.ndarray
) -> float:
    """Best IoU of the mask with the shape at (x, y), about as large as the mask and within the range of radii."""
    radius = np.sqrt(mask.mean() / areas()[shape]) * np.array([0.94, 0.97, 1.0, 1.03, 1.06])
    radius = np.clip(radius, *radii)[:, None, None]
    drawn = signed_distances(centres[None, None, :] - x, centres[None, :, None] - y, radius, np)[shape] < 0
    both, either = (drawn & mask).sum((1, 2)), (drawn | mask).sum((1, 2))
    return float((both / either).max())


def mean_score(images: np.ndarray, scenes: list[Scene]) -> Score:
    """Over images [B, H, H, 3] in [0, 1], each with its scene."""
    scores = [score(image, scene) for image, scene in zip(images, scenes, strict=True)]
    return Score(*(float(np.mean(values)) for values in zip(*scores, strict=True)))
