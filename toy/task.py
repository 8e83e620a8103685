"""What a training is of: images or videos."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

Configs = Callable[[], dict[str, tuple[str, dict[str, Any]]]]
"""Makes class and config.json of every network, by its name in the folder."""


@dataclass(frozen=True)
class Task:
    """Networks, data and losses; both trainings have the phases "vae" and "flow", one after the other."""

    vae: tuple[str, ...]
    """The networks of the first phase, by the names that `configs` has."""
    flow: tuple[str, ...]
    configs: Configs
    tables: Callable[[], dict[str, Any]]
    """Makes the arrays that programs draw data from."""
    vae_loss: Callable[..., jax.Array]
    flow_loss: Callable[..., jax.Array]
    statistics: Callable[..., jax.Array]
    """Computes mean and standard deviation of the latents, which the second phase brings to 0 and 1."""
    autotuned: bool = False
    """Whether XLA times its choices of kernels on a GPU while it compiles."""
