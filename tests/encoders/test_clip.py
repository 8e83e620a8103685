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
from lowering import assert_highest_precision, largest_intermediate, lower_for_cuda
from torch_models import load, redraw, relative_error

from dfa2_jax.encoders.clip import CLIPTextConfig, CLIPTextModel

VOCAB, EOS, LENGTH = 600, 570, 77

# Three layers; heads of 16. The name says which published encoder it stands for.
MODELS: dict[str, dict[str, Any]] = {
    "clip_l": dict(hidden_size=32, num_attention_heads=2, hidden_act="quick_gelu", eos_token_id=2, projection=True),
    "bigg": dict(hidden_size=48, num_attention_heads=3, hidden_act="gelu", eos_token_id=EOS, projection=True),
    "flux": dict(hidden_size=32, num_attention_heads=2, hidden_act="quick_gelu", eos_token_id=2, projection=False),
    "tanh": dict(
        hidden_size=32, num_attention_heads=2, hidden_act="gelu_pytorch_tanh", eos_token_id=EOS, projection=False
    ),
}


def rename(name: str) -> str:
    name = name.removeprefix("text_model.").removeprefix("embeddings.").removeprefix("encoder.")
    name = re.sub(r"layers\.(\d+)", r"layers.#\1", name).replace("mlp.fc1", "mlp.up").replace("mlp.fc2", "mlp.down")
    if "embedding" in name:
        return name.removesuffix(".weight")
    return name.replace("weight", "scale" if "norm" in name else "kernel")


@cache
def reference(name: str) -> torch.nn.Module:
    fields = dict(MODELS[name])
    projection, width = fields.pop("projection"), fields["hidden_size"]
    sizes = dict(
        vocab_size=VOCAB, bos_token_id=569, intermediate_size=4 * width, num_hidden_layers=3, projection_dim=width + 8
    )
    config = transformers.CLIPTextConfig(**sizes, **fields)
    classes = transformers.CLIPTextModelWithProjection, transformers.CLIPTextModel
    return redraw(classes[0 if projection else 1](config))


@cache
def model(name: str, dtype: Any = jnp.float32) -> CLIPTextModel:
    config = CLIPTextConfig.from_json(reference(name).config.to_dict())
    projection = MODELS[name]["projection"]
    make = lambda: CLIPTextModel(config, projection=projection, dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    return load(make, reference(name), rename)


def token_ids(name: str) -> np.ndarray:
    """Prompts of 9 and 75 words, padded as CLIP-L (end of text) or bigG (0). The end-of-text id is the largest only
    where the legacy rule needs it."""
    largest = EOS - 1 if MODELS[name]["eos_token_id"] == 2 else VOCAB - 1
    words = np.random.default_rng(0).integers(1, EOS - 1, (2, 75))
    words[:, 3] = largest
    ids = np.full((2, LENGTH), 0 if name == "bigg" else EOS)
    ids[:, 0] = 569
    ids[0, 1:11], ids[0, 10] = words[0, :10], EOS
    ids[1, 1:76], ids[1, 76] = words[1], EOS
    return ids


def torch_output(torch_model: torch.nn.Module, ids: np.ndarray) -> Any:
    with torch.no_grad():
        return torch_model(torch.tensor(ids), output_hidden_states=True)


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name):
    ids = token_ids(name)
    theirs = torch_output(reference(name), ids)
    ours = jax.jit(lambda model, ids: model(ids))(model(name), jnp.asarray(ids))
    pooled = theirs.text_embeds if MODELS[name]["projection"] else theirs.pooler_output
    errors = {
        "hidden": relative_error(ours.hidden, theirs.hidden_states[-2]),
        "last": relative_error(ours.last, theirs.last_hidden_state),
        "pooled": relative_error(ours.pooled, pooled),
    }
    print(name, errors)
    assert all(error <= 1e-5 for error in errors.values()), errors  # `max` would pass over a NaN


@pytest.mark.parametrize("name", ["clip_l", "bigg"])
def test_bfloat16_is_as_near_as_torch(name):
    ids = token_ids(name)
    exact = torch_output(reference(name), ids)
    rounded = torch_output(reference(name).to(torch.bfloat16), ids)
    reference.cache_clear()  # `.to` changed it in place
    ours = jax.jit(lambda model, ids: model(ids))(model(name, jnp.bfloat16), jnp.asarray(ids))
    assert ours.hidden.dtype == ours.pooled.dtype == jnp.bfloat16
    for a, b, c in (
        (ours.hidden, rounded.hidden_states[-2], exact.hidden_states[-2]),
        (ours.pooled, rounded.text_embeds, exact.text_embeds),
    ):
        error, torch_error = relative_error(a, c), relative_error(b, c)
        print(name, f"{error=:.2e} {torch_error=:.2e}")
        assert error <= 1.5 * torch_error


def test_clip_skip_compiles_once():
    ids, traces = token_ids("clip_l"), []

    @jax.jit
    def hidden(model, ids, skip):
        traces.append(skip)
        return model(ids, skip).hidden

    states = torch_output(reference("clip_l"), ids).hidden_states
    for skip in (0, 1, 2):
        ours = hidden(model("clip_l"), jnp.asarray(ids), jnp.int32(skip))
        assert relative_error(ours, states[-(skip + 2)]) <= 1e-5
        assert relative_error(ours, states[-(skip + 1)]) > 0.1
    assert len(traces) == 1


def test_chosen_state_costs_one_state():
    """`skip` must not make the scan emit every layer's state."""

    def largest(num_layers: int) -> int:
        config = CLIPTextConfig(
            hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=num_layers, vocab_size=9
        )
        make = lambda: CLIPTextModel(config, projection=False, dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
        graph, params = nnx.split(nnx.eval_shape(make))
        ids, skip = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        return largest_intermediate(lambda params, ids, skip: nnx.merge(graph, params)(ids, skip), params, ids, skip)

    assert largest(24) == largest(2)


def test_float32_asks_for_ieee_products():
    ids = jnp.asarray(token_ids("bigg"))
    assert_highest_precision(lower_for_cuda(lambda model, ids: model(ids), model("bigg"), ids))


def test_refuses_what_it_is_not():
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3)
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        CLIPTextConfig.from_json(sizes | {"hidden_act": "relu", "architectures": ["CLIPTextModel"]})
    with pytest.raises(ValueError, match=r"lacks \['hidden_size'\]"):
        CLIPTextConfig.from_json({key: value for key, value in sizes.items() if key != "hidden_size"})
    with pytest.raises(ValueError, match="num_attention_heads=3"):
        CLIPTextConfig.from_json(sizes | {"num_attention_heads": 3})
    with pytest.raises(ValueError, match="num_tokens=78"):
        model("clip_l")(jnp.zeros((1, 78), jnp.int32))
