"""Sizes of a FLUX.1 transformer, and the order of its attention layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfa2_jax.nn.attention import AttentionCall, double_and_single
from dfa2_jax.nn.config import config_from_json
from pallas_kernels.layout import Layout


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes of a `FluxTransformer2DModel`; defaults are diffusers'.

    in_channels: of a token, latents and what lies beside them; out_channels: of latents alone, None: the same.
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim or len(self.axes_dims_rope) != 3:
            raise ValueError(f"{self.axes_dims_rope=} must be three sizes that add up to {self.attention_head_dim=}.")
        if self.token_channels % 4 or self.beside_channels < 0:
            raise ValueError(
                f"out_channels={self.token_channels} must be a multiple of 4, for latents are packed in 2 x 2 patches, "
                f"and {self.in_channels=} at least as many."
            )

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "FluxConfig":
        """From diffusers' config.json; unknown fields are ignored.

        Raises:
            ValueError: tokens are no packed latents.
        """
        if (patch_size := config.get("patch_size", 1)) != 1:
            raise ValueError(f"{patch_size=} must be 1: the pipeline packs latents, not the transformer.")
        return config_from_json(cls, config)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of one token; diffusers packs them in the pipeline and says 1 in the config."""
        return 2

    @property
    def token_channels(self) -> int:
        """Numbers of a token's latents, which the transformer predicts."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def beside_channels(self) -> int:
        """Numbers of what a token holds beside latents: FLUX.1-Fill's picture and mask."""
        return self.in_channels - self.token_channels

    def calls(self, num_text: int, num_visual: int) -> tuple[AttentionCall, ...]:
        """Every attention layer in order of execution: double-stream blocks, then single-stream ones."""
        layout = Layout(num_text, num_visual, text_first=True)
        return double_and_single(layout, self.num_layers, self.num_single_layers)
