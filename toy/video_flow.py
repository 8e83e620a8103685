"""The second phase: the transformer and T5 learn the velocity of variance-preserving diffusion (arXiv 2202.00512)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfa2_jax.families.cogvideox.positions import rope_table
from dfa2_jax.families.cogvideox.transformer import CogVideoXConditions
from dfa2_jax.sampling.solvers.variance_preserving import alphas_cumprod
from dfa2_jax.sampling.tokens import Grid
from toy.flow import DROPPED, Attention, encode, traced_sinusoid
from toy.networks import Setup
from toy.stages import Part
from toy.video_autoencoder import drawn, moments
from toy.video_model import SCHEDULER, WIDTH

TAKES = 4
"""Rows of a batch that one video makes, each with its own noise: encoding all anew would take longer than the rest."""


def patchify(latents: jax.Array) -> jax.Array:
    """[B, f, h, w, C] as tokens of (channel, row, column), [B, V, 4 C]: `sampling.tokens.VideoPatches`, traced."""
    batch, frames, height, width, channels = latents.shape
    grid = latents.reshape(batch, frames, height // 2, 2, width // 2, 2, channels)
    return grid.transpose(0, 1, 2, 4, 6, 3, 5).reshape(batch, -1, 4 * channels)


def flow_loss(setup: Setup, part: Part, params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
    """Mean square error of the velocity, at all timesteps alike."""
    scene, dropped, when, noise = jax.random.split(key, 4)
    takes = min(TAKES, part.batch)
    captions, videos = drawn(setup, part, part.batch // takes, data, scene)
    mean, _ = moments(setup, data["vae"], videos)
    _, frames, height, width, _ = mean.shape
    clean = setup.spread(jnp.repeat(patchify(mean / data["latents"][1]), takes, axis=0))

    batch = len(clean)
    times = jax.random.randint(when, (batch,), 0, SCHEDULER["num_train_timesteps"])
    alpha = jnp.asarray(alphas_cumprod(SCHEDULER).astype(np.float32))[times][:, None, None]
    eps = jax.random.normal(noise, clean.shape)
    noisy = jnp.sqrt(alpha) * clean + jnp.sqrt(1 - alpha) * eps
    velocity = jnp.sqrt(alpha) * eps - jnp.sqrt(1 - alpha) * clean

    empty = data["numbers"].shape[0]
    captions = jnp.where(jax.random.uniform(dropped, (batch,)) < DROPPED, empty, jnp.repeat(captions, takes))
    text = encode(setup, "text_encoder", params, data["ids"][captions])
    transformer = setup.merge("transformer", params["transformer"])
    cos, sin = rope_table(transformer.config, text.shape[1], Grid(frames, height // 2, width // 2))
    conditions = CogVideoXConditions(text, cos=cos, sin=sin)
    times = traced_sinusoid(times.astype(jnp.float32), WIDTH)
    predicted, _ = transformer(noisy, times, conditions, Attention(setup.attention))
    return jnp.square(predicted.astype(jnp.float32) - velocity).mean()
