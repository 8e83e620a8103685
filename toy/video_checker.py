"""What moves in a video, and does it show its caption? Nothing of the caption enters what is seen.

Colours are the nearest of the palette; once it is known which there are, of those. Shapes are those that overlap
most with drawn ones. Directions and speeds come from the path of the object's centre.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from toy.checker import BORDER, areas, best_overlap, centre_of_mass, most_common, nearest_colours
from toy.scenes import COLOURS, SHAPES, pixel_centres
from toy.video_scenes import DIRECTIONS, SPEEDS, Mover, MovingScene

SMALLEST = 0.004
"""The least share of a frame that an object's inner pixels take. Of the smallest drawn ring at 64 px it is 0.008."""
LOOKED_AT = 5
"""Frames whose shapes are compared with drawn ones."""
LARGEST = 0.5
STILL = 0.06
"""What moves less than this in a video stands still."""
BETWEEN_SPEEDS = (SPEEDS["slowly"].length + SPEEDS["quickly"].length) / 2


class Observed(NamedTuple):
    """What a video shows. A mover's direction and speed are "" where it stands still."""

    background: str
    movers: tuple[Mover, ...]


class VideoScore(NamedTuple):
    """Fractions of what a caption asks for, averaged over its movers."""

    background: float
    colour: float
    """Movers of whose colour there is an object."""
    shape: float
    direction: float
    speed: float
    """Those of the mover of the asked colour."""
    exact: float
    """Whether the video shows what the caption asks for, and nothing else."""


def beside(mask: np.ndarray) -> list[np.ndarray]:
    """Each pixel's 4 neighbours in the mask [F, H, W]; there are none outside."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    return [padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]]


def inner(mask: np.ndarray) -> np.ndarray:
    """Pixels whose 4 neighbours are in the mask, too: the blend along an edge of two colours has none."""
    return np.logical_and.reduce([mask, *beside(mask)])


def solid(mask: np.ndarray) -> np.ndarray:
    """The mask without what is thinner than 3 pixels: grey edges of black on white are green, if green is shown."""
    core = inner(mask)
    return np.logical_or.reduce([core, *beside(core)])


def observe(frames: np.ndarray) -> Observed:
    """What a square video [F, H, H, 3] in [0, 1] shows.

    An object is a colour that is not the background's, in more than half of the frames.
    """
    labels = np.stack([nearest_colours(frame) for frame in frames])
    centres = pixel_centres(labels.shape[1])
    border = np.minimum(centres, 1 - centres) < BORDER
    background = most_common(labels[:, border[:, None] | border[None, :]].ravel())
    present = {
        colour: np.flatnonzero(inner(labels == colour).mean((1, 2)) >= SMALLEST) for colour in range(len(COLOURS))
    }
    shown = [colour for colour, where in present.items() if colour == background or len(where) > len(frames) / 2]
    labels = np.stack([nearest_colours(frame, shown) for frame in frames])
    movers = []
    for colour in (colour for colour in shown if colour != background):
        mask = solid(labels == colour)
        motion = seen_motion(mask, present[colour], centres)
        movers.append(Mover(COLOURS[colour], seen_shape(mask[present[colour]], centres), *motion))
    return Observed(COLOURS[background], tuple(movers))


def seen_shape(mask: np.ndarray, centres: np.ndarray) -> str:
    """The shape that overlaps most with the mask [F, H, H], over some of its frames."""
    overlaps = np.zeros(len(SHAPES))
    for some in np.linspace(0, len(mask) - 1, LOOKED_AT).round().astype(int):
        x, y = centre_of_mass(mask[some], centres)
        overlaps += [best_overlap(mask[some], i, x, y, (0, LARGEST), centres) for i in range(len(areas()))]
    return SHAPES[int(overlaps.argmax())]


def seen_motion(mask: np.ndarray, present: np.ndarray, centres: np.ndarray) -> tuple[str, str]:
    """Direction and speed of the mask's centre, by a line through its places in the frames where it is present."""
    places = np.array([centre_of_mass(mask[frame], centres) for frame in present])
    towards = np.polyfit(present / max(1, len(mask) - 1), places, 1)[0]
    length = float(np.hypot(*towards))
    if length < STILL:
        return "", ""
    direction = max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], towards)))
    return direction, "quickly" if length > BETWEEN_SPEEDS else "slowly"


def score(frames: np.ndarray, scene: MovingScene) -> VideoScore:
    """The score of a square video [F, H, H, 3] in [0, 1]."""
    seen = observe(frames)
    of_colour = {mover.colour: mover for mover in seen.movers}
    hits = Counter()
    for asked in scene.movers:
        if mover := of_colour.get(asked.colour):
            hits.update(field for field in Mover._fields if getattr(mover, field) == getattr(asked, field))
    background = seen.background == scene.background
    exact = background and Counter(seen.movers) == Counter(scene.movers)
    fractions = {field: hits[field] / len(scene.movers) for field in Mover._fields}
    return VideoScore(background=float(background), exact=float(exact), **fractions)
