"""Prompts, sizes, plans and images that tests of the report share."""

import numpy as np

from dfa2_jax import Pipeline, Plan

PROMPTS = ["a large red circle", '猫が<b>座っている</b> & "', "قطة صغيرة", "🐱 star"]
SIZE = {"height": 64, "width": 96, "num_inference_steps": 4, "max_sequence_length": 16}


def noisy(seed, scale=0.1):
    generator = np.random.default_rng(seed)
    image = generator.random((32, 48, 3), np.float32)
    return image, np.clip(image + scale * generator.standard_normal(image.shape), 0, 1).astype(np.float32)


def three_plans(folder):
    """A full one, one of arrows after the first step, and one whose heads are all cached by then."""
    full, later = Plan.full(Pipeline.from_pretrained(folder).setting(prompt="", **SIZE)), slice(1, None)
    return {
        "full": full,
        "arrows": full.with_method(later, None, None, "arrow(1/4)"),
        "broken": full.with_method(later, None, None, "cached"),
    }
