"""What is trained when: a stage is a share of the total, its parts are programs, and the learning rate follows both."""

import math
from dataclasses import dataclass

import numpy as np

from toy import model

PEAK = {"vae": 2e-3, "flow": 1e-3}
HOLD = 0.4
"""Share of a phase at the full learning rate; a cosine to nothing follows."""


@dataclass(frozen=True)
class Part:
    """What one call of a compiled program does: `steps` steps on images of one size, or on videos."""

    phase: str
    pixels: int
    batch: int
    steps: int
    t5_length: int = model.T5_LENGTH
    frames: int = 1


@dataclass(frozen=True)
class Stage:
    """A share of the total; its parts, all of one phase, take turns."""

    name: str
    share: float
    parts: tuple[Part, ...]

    @property
    def phase(self) -> str:
        return self.parts[0].phase


def whole_training(batch_64: int, steps: int) -> tuple[Stage, ...]:
    """About as many tokens per step in every part; `batch_64` images of 64 tokens."""
    at_64 = Part("flow", 64, batch_64, steps)
    at_128, at_256 = (Part("flow", 64 * n, max(1, batch_64 // s), steps) for n, s in ((2, 2), (4, 8)))
    long_128 = Part("flow", 128, max(1, batch_64 // 4), max(1, steps // 2), model.T5_DEFAULT_LENGTH)
    long_256 = Part("flow", 256, max(1, batch_64 // 8), max(1, steps // 4), model.T5_DEFAULT_LENGTH)
    vae = [Part("vae", pixels, max(1, batch_64 // s), steps) for pixels, s in ((64, 4), (128, 8), (256, 32))]
    return (
        Stage("vae", 0.15, (vae[0], vae[1], vae[2])),
        Stage("64 tokens", 0.28, (at_64,)),
        Stage("256 tokens", 0.33, (at_128, at_128, at_64, at_128, long_128)),
        Stage("1,024 tokens", 0.24, (at_256, at_128, at_256, long_256, at_256, long_128)),
    )


PRESETS = {
    "gpu": lambda: whole_training(512, 16),
    "cpu": lambda: whole_training(32, 1),
    "smoke": lambda: (
        Stage("vae", 0.4, (Part("vae", 32, 8, 1),)),
        Stage("16 tokens", 0.6, (Part("flow", 32, 8, 1),)),
    ),
}
"""One step per call on CPU, where it takes a second: a slice ends on time."""


def stage_at(stages: tuple[Stage, ...], fraction: float) -> tuple[Stage, float]:
    """The stage at a share of the total, and the learning rate there."""
    ends = np.cumsum([stage.share for stage in stages])
    index = min(int(np.searchsorted(ends, fraction + 1e-9, side="right")), len(stages) - 1)
    phase = stages[index].phase
    spans = [(end - stage.share, end) for stage, end in zip(stages, ends, strict=True) if stage.phase == phase]
    (begin, _), (_, end) = spans[0], spans[-1]
    done = min(1.0, max(0.0, (fraction - begin) / (end - begin)))
    falling = max(0.0, (done - HOLD) / (1 - HOLD))
    return stages[index], PEAK[phase] * 0.5 * (1 + math.cos(math.pi * falling))
