"""The published models' full key lists, from the torch classes on the meta device, fill our parameter trees exactly."""

import mmap
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, CogVideoXTransformer3DModel, FluxTransformer2DModel, SD3Transformer2DModel
from flax import nnx
from real_shapes import PUBLISHED, VIDEOS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from dfa2_jax.families.registry import networks
from dfa2_jax.families.sd3.transformer import PositionTable
from dfa2_jax.weights.rules import map_weights
from dfa2_jax.weights.safetensors import Tensor

pytestmark = pytest.mark.torch

TRANSFORMERS = {
    model.__name__: model for model in (SD3Transformer2DModel, FluxTransformer2DModel, CogVideoXTransformer3DModel)
}

# Parameters of the transformers without the position table, and keys of their files; the published files' sizes agree.
COUNTS = {
    "SD3-medium": (2_028_328_000, 683),
    "SD3.5-medium": (2_243_171_520, 909),
    "SD3.5-large": (8_056_627_520, 1227),
    "FLUX.1-dev": (11_901_408_320, 1160),
    "FLUX.1-schnell": (11_891_178_560, 1156),
    "CogVideoX-2B": (1_693_783_872, 736),
    "CogVideoX-5B": (5_570_283_072, 1024),
    "CogVideoX1.5-5B": (5_570_676_352, 1024),
}

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
BIG_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
    hidden_act="gelu",
)  # fmt: skip
T5_XXL = dict(
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu"
)
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)


NO_BYTES = mmap.mmap(-1, 1)


def map_all(model, class_name, config):
    """Map every key of `model`; -> (leaves, parameters without host tables)."""
    tensors = {
        key: Tensor(Path("meta"), key, "BF16", tuple(value.shape), 0, 0, NO_BYTES)
        for key, value in model.state_dict().items()
    }
    kind = networks()[class_name]
    parsed = kind.config(config)
    abstract = nnx.eval_shape(lambda: kind.build(parsed, dtype="bfloat16", rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(abstract))
    shapes = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in state}
    leaves = map_weights(tensors, kind.rules, shapes, "meta", place=kind.place(parsed))
    assert leaves.keys() == shapes.keys()
    count = sum(leaf.size for _, leaf in state if not isinstance(leaf, PositionTable))
    return tensors, count


@pytest.mark.parametrize("name", COUNTS)
def test_transformers(name):
    published = (PUBLISHED | VIDEOS)[name]
    with torch.device("meta"):
        model = TRANSFORMERS[published.class_name](**published.config)
    tensors, count = map_all(model, published.class_name, published.config)
    assert (count, len(tensors)) == COUNTS[name]
    assert count == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("class_name", "make", "config", "millions"),
    [
        ("CLIPTextModelWithProjection", CLIPTextModelWithProjection, CLIPTextConfig(**CLIP_L), 123.7),
        ("CLIPTextModel", CLIPTextModel, CLIPTextConfig(**CLIP_L), 123.1),
        ("CLIPTextModelWithProjection", CLIPTextModelWithProjection, CLIPTextConfig(**BIG_G), 694.7),
        ("T5EncoderModel", T5EncoderModel, T5Config(**T5_XXL), 4762.3),
    ],
)
def test_text_encoders(class_name, make, config, millions):
    with torch.device("meta"):
        model = make(config)
    _, count = map_all(model, class_name, config.to_dict())
    assert round(count / 1e6, 1) == millions
    assert count == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("quant", [False, True])
def test_autoencoder(quant):
    config = VAE | {"use_quant_conv": quant, "use_post_quant_conv": quant}
    with torch.device("meta"):
        model = AutoencoderKL(**config)
    _, count = map_all(model, "AutoencoderKL", config)
    assert count == sum(parameter.numel() for parameter in model.parameters())
    if not quant:
        assert round(count / 1e6, 1) == 83.8
