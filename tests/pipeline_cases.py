"""Prompts, sizes and diffusers' own pipeline, for the tests that compare whole pipelines."""

import numpy as np

PROMPTS = ["a large red circle on the left of a blue background", "a small green star"]
LENGTH = 64  # T5 tokens
COMMON = {"num_inference_steps": 8, "max_sequence_length": LENGTH}


def load_theirs(folder, dtype="float32", **components):
    import torch
    from diffusers import DiffusionPipeline

    options = {"dtype": getattr(torch, dtype), "local_files_only": True}
    pipeline = DiffusionPipeline.from_pretrained(folder, **options, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_theirs(pipeline, seed=7, **kwargs):
    import torch

    if isinstance(seed, list):
        kwargs["generator"] = [torch.Generator().manual_seed(one) for one in seed]
    else:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    if "sigmas" in kwargs:
        kwargs.pop("num_inference_steps")
        kwargs["num_inference_steps"] = len(kwargs["sigmas"])
    output = pipeline(**kwargs)
    images = output.frames if hasattr(output, "frames") else output.images
    return images.float().numpy() if hasattr(images, "numpy") else np.asarray(images)


def error(ours, theirs):
    return np.linalg.norm(np.float64(ours) - theirs) / np.linalg.norm(np.float64(theirs))
