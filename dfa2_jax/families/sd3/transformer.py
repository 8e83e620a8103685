"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): joint blocks over [visual, text], learned sizes from a config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count as counter
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dfa2_jax.nn.attention import NOTHING, Attend, Dense, Memory, Rows
from dfa2_jax.nn.blocks import JointBlock
from dfa2_jax.nn.layers import MLP, AdaLNOut, linear, matmul_precision, run_blocks, stack
from pallas_kernels.layout import Layout


class Segment(NamedTuple):
    """A run of equal blocks, scanned as one."""

    dual: bool
    last: bool
    count: int


@dataclass(frozen=True, kw_only=True)
class SD3Config:
    """Sizes of an `SD3Transformer2DModel`. diffusers' own defaults match no published model: read config.json."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    caption_projection_dim: int
    pooled_projection_dim: int
    pos_embed_max_size: int
    sample_size: int
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"{self.qk_norm=} is not supported: None (SD3) or 'rms_norm' (SD3.5).")
        if self.caption_projection_dim != self.width:
            raise ValueError(f"{self.caption_projection_dim=} must equal heads x head_dim = {self.width}.")
        if self.in_channels != self.out_channels:
            raise ValueError(f"{self.in_channels=} and {self.out_channels=} must be equal to denoise latents.")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "SD3Config":
        """From diffusers' config.json; fields that diffusers may omit take diffusers' defaults, others are ignored."""
        defaults = {"patch_size": 2, "in_channels": 16, "sample_size": 128, "qk_norm": None}
        known: dict[str, Any] = {name: config.get(name, defaults.get(name)) for name in cls.__dataclass_fields__}
        known["out_channels"] = config.get("out_channels") or known["in_channels"]
        known["dual_attention_layers"] = tuple(config.get("dual_attention_layers") or ())
        missing = sorted(name for name, value in known.items() if value is None and name != "qk_norm")
        if missing:
            raise ValueError(f"The transformer's config.json lacks {missing}.")
        return cls(**known)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """Of one visual token's numbers: patch rows, patch columns, channels."""
        return self.patch_size, self.patch_size, self.in_channels

    @property
    def token_channels(self) -> int:
        return math.prod(self.patch_shape)

    @property
    def segments(self) -> tuple[Segment, ...]:
        last = self.num_layers - 1
        kinds = [(i in self.dual_attention_layers, i == last) for i in range(self.num_layers)]
        return tuple(Segment(*kind, len(list(run))) for kind, run in groupby(kinds))

    @property
    def attention_rows(self) -> Rows:
        """A dual block's second attention runs after its joint one."""
        numbers, rows = counter(), []
        for segment in self.segments:
            pairs = [(next(numbers), next(numbers) if segment.dual else None) for _ in range(segment.count)]
            first, second = zip(*pairs, strict=True)
            rows.append((first, second if segment.dual else ()))
        return tuple(rows)

    def attention_layers(self, num_text: int, num_visual: int) -> dict[str, Layout]:
        """Every attention call by name, in order of execution; the second ones of dual blocks see no text."""
        layers = {}
        for i in range(self.num_layers):
            layers[f"joint.{i}"] = Layout(num_text, num_visual, text_first=False)
            if i in self.dual_attention_layers:
                layers[f"attn2.{i}"] = Layout(0, num_visual, text_first=False)
        return layers

    def place(self, path: str, block: int) -> tuple[str, int]:
        """Path, with its segment, and place there of a parameter of diffusers' `transformer_blocks.{block}`."""
        index = block
        for number, segment in enumerate(self.segments):
            if index < segment.count:
                return path.replace("segments.", f"segments.{number}.", 1), index
            index -= segment.count
        raise ValueError(f"{block=} is beyond the last transformer block, {self.num_layers - 1}.")


class PositionTable(nnx.Variable):
    """The stored position embedding of every patch of the largest image: kept on the host, cropped per image size."""


class SD3Transformer(nnx.Module):
    """Predicts the velocity of every visual token."""

    text_first = False

    def __init__(self, config: SD3Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        to = {"dtype": dtype, "rngs": rngs}
        width = config.width
        self.dtype = jnp.dtype(dtype)
        self.patch_shape = config.patch_shape
        self.pos_embed = PositionTable(jnp.zeros((config.pos_embed_max_size**2, width), dtype))
        self.patch_embed = nnx.LinearGeneral(  # diffusers' convolution over whole patches, as a product
            config.patch_shape,
            width,
            axis=(-3, -2, -1),
            dtype=dtype,
            param_dtype=dtype,
            precision=matmul_precision(dtype),
            rngs=rngs,
        )
        self.timestep_embedder = MLP(256, width, width, activation=jax.nn.silu, **to)
        self.text_embedder = MLP(config.pooled_projection_dim, width, width, activation=jax.nn.silu, **to)
        self.context_embedder = linear(config.joint_attention_dim, width, **to)

        def block(segment: Segment, rngs: nnx.Rngs) -> JointBlock:
            heads, qk_norm = config.num_attention_heads, config.qk_norm is not None
            return JointBlock(
                width, heads, qk_norm=qk_norm, dual=segment.dual, last=segment.last, dtype=dtype, rngs=rngs
            )

        self.segments = nnx.List([stack(segment.count, partial(block, segment), rngs) for segment in config.segments])
        self.counts = tuple(s.count for s in config.segments)
        self.attention_rows = config.attention_rows
        self.norm_out = AdaLNOut(width, **to)
        self.proj_out = linear(width, config.token_channels, **to)

    def __call__(
        self,
        tokens: Float[Array, "B V C"],
        text: Float[Array, "B T E"],
        pooled: Float[Array, "B P"],
        positions: Float[Array, "1 V D"],
        timestep: Float[Array, "#B 256"],
        guidance: None = None,
        *,
        skip: Bool[Array, " layers"] | None = None,
        unroll: int | bool = 1,
        implementation: str | None = None,
    ) -> Float[Array, "B V C"]:
        """Velocity of patchified latents, with dense attention.

        Args:
            tokens: latents in patches of (row, column, channel), `patches.patchify`.
            text: T5 and CLIP states; pooled: projected CLIP states.
            positions: `patches.crop_positions` for the image's patches.
            timestep: `layers.sinusoid` of 1000 sigma.
            skip: blocks to leave out (skip-layer guidance); traced, so another choice compiles nothing.
        """
        args = tokens, text, pooled, positions, timestep, guidance
        return self.velocity(*args, Dense(implementation), skip=skip, unroll=unroll)[0]

    def velocity(
        self,
        tokens: Float[Array, "B V C"],
        text: Float[Array, "B T E"],
        pooled: Float[Array, "B P"],
        positions: Float[Array, "1 V D"],
        timestep: Float[Array, "#B 256"],
        guidance: None,
        attend: Attend,
        memory: tuple[Memory, ...] | None = None,
        rows: tuple[Memory, ...] | None = None,
        *,
        skip: Bool[Array, " layers"] | None = None,
        unroll: int | bool = 1,
    ) -> tuple[Float[Array, "B V C"], tuple[Memory, ...]]:
        """As `__call__`, with any attention, and what it remembers: one entry per segment."""
        layout = Layout(num_text=text.shape[1], num_visual=tokens.shape[1], text_first=self.text_first)
        patches = tokens.astype(self.dtype).reshape(*tokens.shape[:-1], *self.patch_shape)
        visual = self.patch_embed(patches) + positions.astype(self.dtype)
        vector = self.timestep_embedder(timestep.astype(self.dtype)) + self.text_embedder(pooled)
        context, start, remembered = self.context_embedder(text), 0, []

        def step(block: JointBlock, carry: tuple[Array, Array, Memory], per_layer: Any) -> tuple[Array, Array, Memory]:
            skip, rows = per_layer

            def run(carry: tuple[Array, Array, Memory]) -> tuple[Array, Array, Memory]:
                visual, context, memory = carry
                return block(visual, context, vector, layout, attend=attend, memory=memory, rows=rows)

            return run(carry) if skip is None else jax.lax.cond(skip, lambda carry: carry, run, carry)

        for i, (blocks, count) in enumerate(zip(self.segments, self.counts, strict=True)):
            flags = None if skip is None else skip[start : start + count]
            carry = visual, context, NOTHING if memory is None else memory[i]
            per_layer = flags, NOTHING if rows is None else rows[i]
            visual, context, last = run_blocks(blocks, step, carry, per_layer, unroll=unroll)
            remembered.append(last)
            start += count
        return self.proj_out(self.norm_out(visual, vector)), tuple(remembered)
