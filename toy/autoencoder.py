"""The first phase: an autoencoder of drawn scenes, and the statistics of its latents."""

from typing import Any

import jax
import jax.numpy as jnp

from toy.data import draw
from toy.networks import Setup
from toy.stages import Part

KL = 3e-4
"""Weight of the posterior's divergence from a normal distribution."""


def moments(setup: Setup, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance of the autoencoder's posterior, float32 [B, h, w, C]."""
    encoded = setup.merge("vae", params).encoder(images.astype(setup.dtype)).astype(jnp.float32)
    mean, log_variance = jnp.split(encoded, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30, 20)


def vae_loss(setup: Setup, part: Part, params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
    picture, noise = jax.random.split(key)
    _, images = draw(setup, part, data, picture)
    mean, log_variance = moments(setup, params["vae"], images)
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(noise, mean.shape)
    decoded = setup.merge("vae", params["vae"]).decoder(z.astype(setup.dtype)).astype(jnp.float32)
    return distortion(decoded, images, mean, log_variance)


def distortion(decoded: jax.Array, truth: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """The loss of an autoencoder: what is not reconstructed, and the divergence of the posterior from a normal one."""
    kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
    return jnp.abs(decoded - truth).mean() + jnp.square(decoded - truth).mean() + KL * kl


def latent_statistics(setup: Setup, part: Part, params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
    """Mean and standard deviation of an autoencoder's latents."""

    @jax.jit
    def statistics(params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
        _, images = draw(setup, Part("vae", part.pixels, 64, 1), data, key)
        mean, _ = moments(setup, params, images)
        return jnp.stack([mean.mean(), mean.std()])

    return jnp.round(statistics(params, data, key), 4)
