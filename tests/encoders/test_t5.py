import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from lowering import assert_highest_precision, lower_for_cuda
from torch_models import load, redraw, relative_error
from transformers.models.t5.modeling_t5 import T5Attention

from dfa2_jax.encoders.t5 import T5Config, T5Encoder, relative_position_buckets

# Heads of 16 whose widths do not add up to d_model, and an epsilon that no default hides.
SIZES = dict(vocab_size=140, d_model=48, d_kv=16, d_ff=80, num_layers=3, num_heads=4, layer_norm_epsilon=1e-2)

NAMES = {
    "layer.0.SelfAttention": "attention",
    "layer.0.layer_norm": "attention_norm",
    "layer.1.layer_norm": "ff_norm",
    "layer.1.DenseReluDense.": "",
}


def rename(name: str) -> str:
    if "relative_attention_bias" in name:
        return "relative_attention_bias"
    name = re.sub(r"block\.(\d+)", r"layers.#\1", name.removeprefix("encoder."))
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    if name == "shared.weight":
        return "shared"
    return name.replace("weight", "scale" if "norm" in name else "kernel")


@cache
def reference() -> torch.nn.Module:
    return redraw(transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **SIZES)))


@cache
def model(dtype: Any = jnp.float32) -> T5Encoder:
    config = T5Config.from_json(reference().config.to_dict())
    return load(lambda: T5Encoder(config, dtype=dtype, rngs=nnx.Rngs(0)), reference(), rename)


def token_ids(num_tokens: int) -> np.ndarray:
    """Half of the second prompt is padding (0), which is attended."""
    ids = np.random.default_rng(0).integers(3, 140, (2, num_tokens))
    ids[1, num_tokens // 2 :] = 0
    return ids


def torch_output(torch_model: torch.nn.Module, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return torch_model(torch.tensor(ids))[0]


@pytest.mark.parametrize("num_tokens", [1, 77, 256, 512])
def test_equals_transformers(num_tokens):
    ids = token_ids(num_tokens)
    ours = jax.jit(lambda model, ids: model(ids))(model(), jnp.asarray(ids))
    error = relative_error(ours, torch_output(reference(), ids))
    print(num_tokens, f"{error=:.2e}")
    assert error <= 1e-5


def test_bfloat16_is_as_near_as_torch():
    ids = token_ids(256)
    exact = torch_output(reference(), ids)
    rounded = torch_output(reference().to(torch.bfloat16), ids)
    reference.cache_clear()  # `.to` changed it in place
    ours = jax.jit(lambda model, ids: model(ids))(model(jnp.bfloat16), jnp.asarray(ids))
    assert ours.dtype == jnp.bfloat16
    error, torch_error = relative_error(ours, exact), relative_error(rounded, exact)
    print(f"{error=:.2e} {torch_error=:.2e}")
    assert error <= 1.5 * torch_error


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 20), (64, 256), (8, 128)])
def test_buckets_equal_torch(num_buckets, max_distance):
    distances = np.arange(-1023, 1024)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(distances), num_buckets=num_buckets, max_distance=max_distance
    )
    ours = relative_position_buckets(distances, num_buckets=num_buckets, max_distance=max_distance)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_float32_asks_for_ieee_products():
    assert_highest_precision(lower_for_cuda(lambda model, ids: model(ids), model(), jnp.asarray(token_ids(77))))


@pytest.mark.parametrize("kind", ["relu", "gated-silu", None])
def test_refuses_other_feed_forwards(kind):
    json = SIZES if kind is None else SIZES | {"feed_forward_proj": kind}
    with pytest.raises(ValueError, match=f"feed_forward_proj='{kind or 'relu'}', but only 'gated-gelu'"):
        T5Config.from_json(json)
