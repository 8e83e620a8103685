"""Train the video model in the box: the autoencoder first, then the transformer with T5.

    python -m toy.video_train --out build/video --total-seconds 1300 --result build/video-result

All is as in `toy.train`: the same command goes on from the last checkpoint, and `--seconds` cuts it into slices.
"""

from functools import cache
from typing import Any

import numpy as np

from toy import video_scenes
from toy.stages import Part, Stage
from toy.task import Task
from toy.train import run
from toy.video_autoencoder import latent_spread, vae_loss
from toy.video_flow import flow_loss
from toy.video_model import END, FRAMES, PAD, T5_LENGTH, configs, token_ids


@cache
def tables() -> dict[str, Any]:
    """Token ids and scene numbers of every caption, the empty one last, and which to train on."""
    singles, pairs, _ = video_scenes.split()
    numbers = video_scenes.number_table()
    empty = np.array([[END] + [PAD] * (T5_LENGTH - 1)], np.int32)
    return {"numbers": numbers, "singles": singles, "pairs": pairs, "ids": np.concatenate([token_ids(numbers), empty])}


VIDEOS = Task(
    vae=("vae",),
    flow=("transformer", "text_encoder"),
    configs=configs,
    tables=tables,
    vae_loss=vae_loss,
    flow_loss=flow_loss,
    statistics=latent_spread,
    autotuned=True,
)
"""Autotuned: on an H200 a step of the autoencoder takes 33 ms, after a minute of compilation. Else it takes 1.9 s, for
cuDNN's own choices."""


def whole_training(batch: int, steps: int) -> tuple[Stage, ...]:
    """About as many tokens per step in every part; `batch` rows of 320 tokens."""
    vae = Part("vae", 64, max(1, batch // 8), steps, frames=FRAMES)
    at_64, at_96 = (Part("flow", side, max(1, batch // s), steps, frames=FRAMES) for side, s in ((64, 1), (96, 2)))
    return (
        Stage("vae", 0.05, (vae,)),
        Stage("320 tokens", 0.6, (at_64,)),
        Stage("720 tokens", 0.35, (at_96, at_64)),
    )


PRESETS = {
    "gpu": lambda: whole_training(256, 8),
    "cpu": lambda: whole_training(16, 1),
    "smoke": lambda: (
        Stage("vae", 0.4, (Part("vae", 16, 8, 1, frames=9),)),
        Stage("12 tokens", 0.6, (Part("flow", 16, 32, 1, frames=9),)),
    ),
}
"""The smoke's videos are of one chunk, which compiles in half the time."""

if __name__ == "__main__":
    run(VIDEOS, PRESETS, about=__doc__, out="build/video", total=1300)
