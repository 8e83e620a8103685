"""AdamW with clipped gradients, and a running average of what it trains."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from toy import model
from toy.networks import initial
from toy.task import Configs

WARM_UP = 200  # steps
EMA, CLIP_NORM, WEIGHT_DECAY = 0.999, 1.0, 0.01
ADAM = optax.scale_by_adam(b1=0.9, b2=0.99)


class Weights(NamedTuple):
    """The weights of one phase's networks, by name: what is trained, its running average, and Adam's moments."""

    params: Any
    ema: Any
    mu: Any
    nu: Any
    step: Any


def fresh_weights(names: tuple[str, ...], seed: int, configs: Configs = model.configs) -> Weights:
    params = {name: initial(name, seed, configs) for name in names}

    def zeros() -> Any:
        return jax.tree.map(np.zeros_like, params)

    return Weights(params, jax.tree.map(np.copy, params), zeros(), zeros(), np.zeros((), np.int32))


def update(weights: Weights, grads: Any, rate: jax.Array, warm_up: int) -> Weights:
    """AdamW with clipped gradients, and the running average."""
    params, ema, mu, nu, step = weights
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, CLIP_NORM / (norm + 1e-6)), grads)
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        moves, adam = ADAM.update(grads, optax.ScaleByAdamState(step, mu, nu))
    count = step.astype(jnp.float32)
    rate = rate * jnp.minimum(1.0, (count + 1) / warm_up)
    params = jax.tree.map(lambda p, m: p - rate * (m + WEIGHT_DECAY * p), params, moves)
    decay = jnp.minimum(EMA, (1 + count) / (10 + count))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
    return Weights(params, ema, adam.mu, adam.nu, adam.count)
