"""The first phase: an autoencoder of moving shapes, chunk by chunk as the library's, and the spread of its latents."""

from typing import Any

import jax
import jax.numpy as jnp

from dfa2_jax.vae.video import frame_chunks, video_chunks
from toy.autoencoder import distortion
from toy.data import choose
from toy.networks import Setup
from toy.stages import Part
from toy.video_scenes import draw

SAMPLE = 32
"""Videos whose latents' spread is taken."""


def drawn(setup: Setup, part: Part, videos: int, data: dict[str, Any], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of captions, as `tables` counts them, and their videos [B, F, H, W, 3] in [-1, 1]."""
    captions, picture = choose(setup, videos, data, key)
    return captions, setup.spread(draw(data["numbers"][captions], picture, part.pixels, part.frames) * 2 - 1)


def moments(setup: Setup, params: Any, videos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance of the autoencoder's posterior, float32 [B, f, h, w, C], not scaled."""
    vae, cache, parts = setup.merge("vae", params), None, []
    for chunk in video_chunks(videos.shape[1]):
        part, cache = vae.encoder(videos[:, chunk].astype(setup.dtype), cache)
        parts.append(part.astype(jnp.float32))
    mean, log_variance = jnp.split(jnp.concatenate(parts, axis=1), 2, axis=-1)
    return mean, jnp.clip(log_variance, -30, 20)


def decoded(setup: Setup, params: Any, latents: jax.Array) -> jax.Array:
    """Videos of latents that are not scaled, float32."""
    vae, cache, parts = setup.merge("vae", params), None, []
    for chunk in frame_chunks(latents.shape[1]):
        part, cache = vae.decoder(latents[:, chunk].astype(setup.dtype), cache)
        parts.append(part.astype(jnp.float32))
    return jnp.concatenate(parts, axis=1)


def vae_loss(setup: Setup, part: Part, params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
    scene, noise = jax.random.split(key)
    _, videos = drawn(setup, part, part.batch, data, scene)
    mean, log_variance = moments(setup, params["vae"], videos)
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(noise, mean.shape)
    return distortion(decoded(setup, params["vae"], z), videos, mean, log_variance)


def latent_spread(setup: Setup, part: Part, params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
    """0, as CogVideoX shifts no latents, and the root of their mean square."""

    @jax.jit
    def spread(params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
        _, videos = drawn(setup, part, SAMPLE, data, key)
        mean, _ = moments(setup, params, videos)
        return jnp.stack([jnp.zeros(()), jnp.sqrt(jnp.square(mean).mean())])

    return jnp.round(spread(params, data, key), 4)
