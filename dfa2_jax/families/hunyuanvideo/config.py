"""Sizes of a HunyuanVideo transformer, and the order of its attention layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfa2_jax.nn.attention import AttentionCall, double_and_single
from dfa2_jax.nn.config import config_from_json
from pallas_kernels.layout import Layout

ONLY = {"qk_norm": "rms_norm", "mlp_ratio": 4.0, "image_condition_type": None}
"""Fields of config.json with one value that is implemented. The last is of image to video."""


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoConfig:
    """Sizes of a `HunyuanVideoTransformer3DModel`; defaults are diffusers', the published 13B model's.

    num_refiner_layers: blocks that refine text before all others.
    patch_size_t: latent frames of one token.
    rope_axes_dim: how many channels of a head turn with the frame, the row and the column.
    """

    in_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    patch_size: int = 2
    patch_size_t: int = 1
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        if sum(self.rope_axes_dim) != self.attention_head_dim or len(self.rope_axes_dim) != 3:
            raise ValueError(f"{self.rope_axes_dim=} must be three sizes that add up to {self.attention_head_dim=}.")
        if wrong := [f"{name}={getattr(self, name)}" for name in SIZES if getattr(self, name) < 1]:
            raise ValueError(f"{', '.join(wrong)} must be 1 or more.")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "HunyuanVideoConfig":
        """From diffusers' config.json; unknown fields are ignored.

        Raises:
            ValueError: what is not implemented, or a model whose input is not its output (image to video).
        """
        made = config_from_json(cls, config)
        for name, wanted in (ONLY | {"out_channels": made.in_channels}).items():
            if (value := config.get(name, wanted)) != wanted:
                raise ValueError(f"{name}={value!r:.100} is not supported: text to video has {wanted!r}.")
        return made

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames that the autoencoder makes of a latent frame: config.json does not say so."""
        return 4

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def joint_attention_dim(self) -> int:
        return self.text_embed_dim

    @property
    def token_channels(self) -> int:
        return self.in_channels * self.patch_size_t * self.patch_size**2

    def calls(self, num_text: int, num_visual: int) -> tuple[AttentionCall, ...]:
        """Every joint attention layer in order of execution: double-stream blocks, then single-stream ones."""
        layout = Layout(num_text, num_visual, text_first=False)
        return double_and_single(layout, self.num_layers, self.num_single_layers)


SIZES = "num_layers", "num_single_layers", "num_refiner_layers", "num_attention_heads", "patch_size", "patch_size_t"
