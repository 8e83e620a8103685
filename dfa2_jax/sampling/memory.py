"""Where compressed sampling keeps every head's last output."""

import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def cache_shapes(
    config: Any, num_text: int, num_visual: int, batch: int, dtype: DTypeLike
) -> tuple[tuple[jax.ShapeDtypeStruct | None, ...], ...]:
    """Shapes of `caches` for a model: by segment, a stack of outputs for each of its blocks' attentions.

    Args:
        config: the model's.
        batch: of the transformer, twice the images under classifier-free guidance.
    """
    lengths = [layout.length for layout in config.attention_layers(num_text, num_visual).values()]
    heads = config.num_attention_heads, config.attention_head_dim

    def of(numbers: tuple[int, ...]) -> jax.ShapeDtypeStruct | None:
        return jax.ShapeDtypeStruct((len(numbers), batch, lengths[numbers[0]], *heads), dtype) if numbers else None

    return tuple((of(first), of(second)) for first, second in config.attention_rows)


def empty_caches(
    config: Any, num_text: int, num_visual: int, batch: int, dtype: DTypeLike, *, images: int
) -> tuple[tuple[jax.Array | None, ...], ...]:
    """Zeros in the shapes of `cache_shapes`, for a batch of this many images.

    Raises:
        MemoryError: they do not fit; the message says what would.
    """
    shapes = cache_shapes(config, num_text, num_visual, batch, dtype)
    need, free = sum(one.size * one.dtype.itemsize for one in jax.tree.leaves(shapes)), free_bytes()
    if need > free:
        fitting = int(free / need * images)
        smaller = f"one image takes {need / images / 1e9:.1f} GB: take a smaller one, or no plan"
        advice = f"a batch of {fitting} would fit" if fitting else smaller
        raise MemoryError(
            f"The plan keeps {need / 1e9:.1f} GB of attention outputs for {images} images of {num_visual} visual "
            f"tokens, and {free / 1e9:.1f} GB are free: {advice}."
        )
    return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)


def free_bytes() -> int:
    """What the default device can still hold; of a CPU's memory, what programs can get without swapping."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")  # Linux alone
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return int(available[1]) * 1024 if available else sys.maxsize
