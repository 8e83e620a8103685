"""Sizes of a CogVideoX transformer, and the order of its attention layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfa2_jax.nn.attention import AttentionCall
from dfa2_jax.nn.config import config_from_json
from pallas_kernels.layout import Layout

ONLY = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "attention_bias": True,
    "norm_elementwise_affine": True,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "use_learned_positional_embeddings": False,
    "ofs_embed_dim": None,
}
"""Fields of config.json with one value that is implemented, which text-to-video models have. The last two are of image
to video."""


@dataclass(frozen=True, kw_only=True)
class CogVideoXConfig:
    """Sizes of a `CogVideoXTransformer3DModel`; defaults are diffusers', CogVideoX-2B's.

    sample_height, sample_width: latent pixels of the videos that it was trained on; rotary positions refer to them.
    sample_frames: frames of those videos.
    temporal_compression_ratio: frames of one latent frame.
    patch_size_t: latent frames of one token, in CogVideoX 1.5.
    """

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    num_layers: int = 30
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    max_text_seq_length: int = 226
    sample_height: int = 60
    sample_width: int = 90
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = ("num_attention_heads", "num_layers", "patch_size", "temporal_compression_ratio", "sample_frames")
        if wrong := [f"{name}={getattr(self, name)}" for name in sizes if getattr(self, name) < 1]:
            raise ValueError(f"{', '.join(wrong)} must be 1 or more.")
        if self.attention_head_dim % 16:
            raise ValueError(f"{self.attention_head_dim=} must be a multiple of 16: rotary positions share it.")
        if not self.use_rotary_positional_embeddings and self.patch_size_t is not None:
            raise ValueError(f"{self.patch_size_t=} needs use_rotary_positional_embeddings, as CogVideoX 1.5 has them.")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "CogVideoXConfig":
        """From diffusers' config.json; unknown fields are ignored.

        Raises:
            ValueError: what is not implemented, or a model whose input is not its output (image to video).
        """
        made = config_from_json(cls, config)
        for name, wanted in (ONLY | {"out_channels": made.in_channels}).items():
            if (value := config.get(name, wanted)) != wanted and (name, value) != ("out_channels", None):
                raise ValueError(f"{name}={value!r:.100} is not supported: text to video has {wanted!r}.")
        return made

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def joint_attention_dim(self) -> int:
        return self.text_embed_dim

    @property
    def token_frames(self) -> int:
        """Latent frames of one token."""
        return self.patch_size_t or 1

    @property
    def token_channels(self) -> int:
        return self.in_channels * self.patch_size**2 * self.token_frames

    def calls(self, num_text: int, num_visual: int) -> tuple[AttentionCall, ...]:
        """Every attention layer in order of execution."""
        layout, stack = Layout(num_text, num_visual, text_first=True), "transformer_blocks.attn"
        return tuple(AttentionCall(f"block.{i}", i, stack, i, layout) for i in range(self.num_layers))
