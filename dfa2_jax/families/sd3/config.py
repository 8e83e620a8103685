"""Sizes of an SD3 transformer, and the order of its attention layers."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dfa2_jax.nn.attention import AttentionCall
from dfa2_jax.nn.config import config_from_json
from pallas_kernels.layout import Layout


@dataclass(frozen=True)
class Segment:
    """A run of equal blocks, scanned as one."""

    dual: bool
    last: bool
    count: int


@dataclass(frozen=True, kw_only=True)
class SD3Config:
    """Sizes of an `SD3Transformer2DModel`. Of diffusers' defaults, only these match published models.

    out_channels: None: as `in_channels`.
    """

    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    caption_projection_dim: int
    pooled_projection_dim: int
    pos_embed_max_size: int
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = None
    sample_size: int = 128
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"{self.qk_norm=} is not supported: None (SD3) or 'rms_norm' (SD3.5).")
        if self.caption_projection_dim != self.width:
            raise ValueError(f"{self.caption_projection_dim=} must equal heads x head_dim = {self.width}.")
        if self.out_channels not in (None, self.in_channels):
            raise ValueError(f"{self.in_channels=} and {self.out_channels=} must be equal to denoise latents.")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "SD3Config":
        """From diffusers' config.json; unknown fields are ignored."""
        layers = config.get("dual_attention_layers") or ()  # of SD3 it may be null
        return config_from_json(cls, {**config, "dual_attention_layers": layers})

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """The shape of one visual token's numbers: patch rows, patch columns, channels."""
        return self.patch_size, self.patch_size, self.in_channels

    @property
    def token_channels(self) -> int:
        return math.prod(self.patch_shape)

    @property
    def segments(self) -> tuple[Segment, ...]:
        last = self.num_layers - 1
        kinds = [(i in self.dual_attention_layers, i == last) for i in range(self.num_layers)]
        return tuple(Segment(*kind, len(list(run))) for kind, run in groupby(kinds))

    def calls(self, num_text: int, num_visual: int) -> tuple[AttentionCall, ...]:
        """Every attention layer in order of execution; the second one of a dual block follows its joint one."""
        joint = Layout(num_text, num_visual, text_first=False)
        alone = Layout(0, num_visual, text_first=False)
        layers, filled = [], Counter[str]()
        for block in range(self.num_layers):
            segment, _ = self.place("segments.", block)
            for plan_name, name, layout in (("joint", "attn", joint), ("attn2", "attn2", alone)):
                if name == "attn" or block in self.dual_attention_layers:
                    stack = segment + name
                    layers.append(AttentionCall(f"{plan_name}.{block}", block, stack, filled[stack], layout))
                    filled[stack] += 1
        return tuple(layers)

    def place(self, path: str, block: int) -> tuple[str, int]:
        """Path, with its segment, and place there of a parameter of diffusers' `transformer_blocks.{block}`."""
        index = block
        for number, segment in enumerate(self.segments):
            if index < segment.count:
                return path.replace("segments.", f"segments.{number}.", 1), index
            index -= segment.count
        raise ValueError(f"{block=} is beyond the last transformer block, {self.num_layers - 1}.")
