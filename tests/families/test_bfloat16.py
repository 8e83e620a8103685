"""Whole loops in bfloat16: as close to float32 as torch is, and equal to torch where it rounds, on request."""

import jax.numpy as jnp
import numpy as np
import pytest

from dfa2_jax.pipeline.pipeline import Pipeline

pytestmark = pytest.mark.torch

IMAGE = {"height": 64, "width": 96, "num_inference_steps": 8, "guidance_scale": 3.5}
VIDEO = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 6}
DPM = {"scheduler": "CogVideoXDPMScheduler", "use_dynamic_cfg": True}
SEED = 7


def embeddings(folder):
    """Random prompt embeddings: the loop is compared, not the encoders."""
    import json

    config = json.loads((folder / "transformer" / "config.json").read_text())
    draw = np.random.default_rng(0).standard_normal
    if config["_class_name"].startswith("CogVideoX"):
        shape = 1, config["max_text_seq_length"], config["text_embed_dim"]
        return {name: draw(shape).astype(np.float32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    width = config.get("joint_attention_dim", config.get("text_embed_dim"))
    shapes = [(1, 40, width), (1, config["pooled_projection_dim"])]
    given = {name: draw(shape).astype(np.float32) for name, shape in zip(names, shapes, strict=True)}
    if config["_class_name"] == "SD3Transformer2DModel":
        given |= {f"negative_{name}": draw(x.shape).astype(np.float32) for name, x in given.items()}
    if config["_class_name"].startswith("HunyuanVideo"):
        given["prompt_attention_mask"] = np.float32([[1] * 29 + [0] * 11])
    return given


def ours(folder, dtype, arguments=IMAGE, **options):
    pipeline = Pipeline.from_pretrained(folder, dtype=dtype, **options)
    out = pipeline(**embeddings(folder), **arguments, seed=SEED, output_type="latent", progress=False)
    return np.asarray(out.images if out.frames is None else out.frames, np.float64)


def theirs(folder, dtype, arguments=IMAGE, *, float32_sinusoids=False):
    """diffusers' latents; optionally with time and guidance embedded from float32 numbers, as ours are."""
    import diffusers
    import torch

    dtype = getattr(torch, dtype)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if float32_sinusoids:
        embed_exactly(pipeline)
    given = {name: torch.tensor(x).to(dtype) for name, x in embeddings(folder).items()}
    arguments = dict(arguments)
    if name := arguments.pop("scheduler", None):
        config = pipeline.scheduler.config
        pipeline.scheduler = getattr(diffusers, name).from_config(config, timestep_spacing="trailing")
    if "num_frames" in arguments:
        given["max_sequence_length"] = given["prompt_embeds"].shape[1]
    generator = torch.Generator().manual_seed(SEED)
    out = pipeline(**given, **arguments, generator=generator, output_type="latent")
    return (out.frames if "num_frames" in arguments else out.images).double().numpy()


def embed_exactly(pipeline):
    """Replace the numbers that FLUX rounds to its dtype by those of the scheduler, one forward a step."""
    import torch

    embedder, calls = pipeline.transformer.time_text_embed, []
    forward = embedder.time_proj.forward
    per_step = 2 if hasattr(embedder, "guidance_embedder") else 1

    def exact(rounded):
        step, which = divmod(len(calls), per_step)
        calls.append(which)
        value = pipeline.scheduler.timesteps[step] if which == 0 else torch.tensor(1000 * IMAGE["guidance_scale"])
        assert abs(value - rounded[0].float()) <= 0.01 * value
        return forward(value.float().expand(len(rounded)))

    embedder.time_proj.forward = exact


def error(x, exact):
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_sd35", "tiny_flux_dev", "tiny_flux_schnell"])
def test_loops_are_as_close_to_float32_as_torch(name, request):
    folder = request.getfixturevalue(name)
    exact = theirs(folder, "float32")
    torch_error = error(theirs(folder, "bfloat16", float32_sinusoids=True), exact)
    assert error(ours(folder, "bfloat16"), exact) < 1.5 * torch_error


@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_dev"])
def test_torch_rounding_reproduces_diffusers(name, request):
    """With torch's roundings the distance to diffusers' bfloat16 latents is what bfloat16 arithmetic alone leaves."""
    folder = request.getfixturevalue(name)
    want = theirs(folder, "bfloat16")
    floor = error(theirs(folder, "bfloat16", float32_sinusoids=True), theirs(folder, "float32"))
    assert error(ours(folder, "bfloat16", torch_rounding=True), want) < 1.5 * floor
    if name == "tiny_flux_dev":  # guidance 3.5 becomes 3504: another image, unless the rounding is reproduced
        assert error(ours(folder, "bfloat16"), want) > 3 * floor


VIDEOS = {
    "2b": ("tiny_cogvideox_2b", VIDEO),
    "5b, dpm": ("tiny_cogvideox_5b", VIDEO | DPM),
    "1.5": ("tiny_cogvideox_15", VIDEO),
}


@pytest.mark.parametrize("case", ["5b, dpm", *(pytest.param(case, marks=pytest.mark.long) for case in ("2b", "1.5"))])
def test_videos_are_as_close_to_float32_as_torch(case, request):
    """With torch's roundings, too. tests/sampling/test_vp_rounding.py shows where those are."""
    name, arguments = VIDEOS[case]
    folder = request.getfixturevalue(name)
    exact = theirs(folder, "float32", arguments)
    torch_error = error(theirs(folder, "bfloat16", arguments), exact)
    for options in ({}, {"torch_rounding": True}):
        latents = ours(folder, "bfloat16", arguments, **options)
        assert error(latents, exact) < 1.5 * torch_error
        is_rounded = np.array_equal(latents.astype(jnp.bfloat16).astype(np.float64), latents)
        assert is_rounded == bool(options)


def test_hunyuanvideo_rounds_guidance_and_all_times_but_the_first(tiny_hunyuanvideo):
    """diffusers gives times the dtype of latents, which are float32 until a step rounds them. Guidance 6 is 6016."""
    want, exact = (theirs(tiny_hunyuanvideo, dtype, VIDEO) for dtype in ("bfloat16", "float32"))
    near = ours(tiny_hunyuanvideo, "bfloat16", VIDEO)
    floor = error(near, exact)
    assert floor < 0.02
    assert error(ours(tiny_hunyuanvideo, "bfloat16", VIDEO, torch_rounding=True), want) < 2 * floor
    assert error(near, want) > 4 * floor
