"""Networks in Flax NNX, by the class name that a diffusers folder gives them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from flax import nnx

from .clip import CLIPTextConfig, CLIPTextModel
from .flux import FluxConfig, FluxTransformer
from .sd3 import SD3Config, SD3Transformer
from .t5 import T5Config, T5Encoder
from .vae import AutoencoderConfig, AutoencoderKL


class ModelKind(NamedTuple):
    """How to make a network: `build(config_from_json(config), dtype=..., rngs=...)`."""

    config_from_json: Callable[[dict[str, Any]], Any]
    build: Callable[..., nnx.Module]


MODELS = {
    "SD3Transformer2DModel": ModelKind(SD3Config.from_json, SD3Transformer),
    "FluxTransformer2DModel": ModelKind(FluxConfig.from_json, FluxTransformer),
    "AutoencoderKL": ModelKind(AutoencoderConfig.from_json, AutoencoderKL),
    "CLIPTextModel": ModelKind(CLIPTextConfig.from_json, partial(CLIPTextModel, projection=False)),
    "CLIPTextModelWithProjection": ModelKind(CLIPTextConfig.from_json, partial(CLIPTextModel, projection=True)),
    "T5EncoderModel": ModelKind(T5Config.from_json, T5Encoder),
}
