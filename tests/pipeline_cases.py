"""Prompts, sizes and diffusers' own pipeline, for the tests that compare whole pipelines."""

import numpy as np

from dfa2_jax import Method, Plan
from dfa2_jax.options import Options
from dfa2_jax.plan.orders import lies, orders
from pallas_kernels import CACHED

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


METHODS = tuple(map(Method, ("full", "cached", "arrow(1/4)", "arrow(1/2)", "arrow(1/4, time)")))


def random_plan(setting, seed):
    generator, methods = np.random.default_rng(seed), METHODS if setting.token_frames > 1 else METHODS[:-1]
    size = setting.num_inference_steps, len(setting.layers), setting.num_heads
    choices = generator.integers(len(methods), size=size).astype(np.uint8)
    choices[0] = 0
    return Plan(setting, methods, choices)


def check_planned(ours, reference, arguments, theirs, seeds):
    """Latents by random plans of every method, most of them with heads that are cached after another order.

    They equal those of diffusers with masks and reuse written out in torch.

    Args:
        reference: diffusers' pipeline, whose processors change.
        arguments: of our call; theirs: of the same call of diffusers.
    """
    from torch_reference import follow_plan

    call, errors, written = ours.prepare(Options(**arguments, output_type="latent")), [], []
    layouts = [layer.layout for layer in call.layers]
    dense = ours(**arguments, output_type="latent", progress=False).frames
    for seed in seeds:
        plan = random_plan(call.setting, seed)
        assert {*plan.choices.ravel()} == {*range(len(METHODS))}
        latents = ours(**arguments, plan=plan, output_type="latent", progress=False).frames
        run = follow_plan(reference, plan.half_windows(), layouts, orders(plan) == 1, call.grid.frames)
        want = run_theirs(reference, **theirs, callback_on_step_end=run.next_step, output_type="latent")
        errors.append(error(latents, want))
        written.append(lies(plan)[plan.half_windows() == CACHED])
        assert error(latents, dense) > 1e-2, "the plan is idle"
    assert all(number < 1e-4 for number in errors), errors  # `max` would pass over a NaN
    assert {*np.concatenate(written)} == {0, 1}, "cached heads lie in one order alone"


def planned_error(ours, reference, arguments, plan, theirs=None, layouts=None):
    """How far images by a plan are from diffusers' with masks and reuse written out in torch; and our output.

    Args:
        theirs: arguments of diffusers' call, where they are others.
        layouts: of diffusers' tokens, where their order is another.
    """
    from torch_reference import follow_plan

    call = ours.prepare(Options(**arguments, plan=plan, output_type="latent"))
    output = ours(**arguments, plan=plan, output_type="latent", progress=False)
    processors = reference.transformer.attn_processors
    run = follow_plan(reference, call.plan.half_windows(), layouts or [layer.layout for layer in call.layers])
    want = run_theirs(reference, **(theirs or arguments), callback_on_step_end=run.next_step, output_type="latent")
    reference.transformer.set_attn_processor(processors)
    return error(output.images, want), output
