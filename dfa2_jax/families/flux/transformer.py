"""FLUX.1 dev and schnell: double-stream then single-stream blocks over [text, visual], rotary positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.attention import NOTHING, Attend, Dense, Heads, Memory, Rows
from dfa2_jax.nn.blocks import Attention, JointBlock, Rope, rotate
from dfa2_jax.nn.layers import MLP, AdaLN, AdaLNOut, layer_norm, linear, merge_heads, run_blocks, stack
from pallas_kernels.layout import Layout


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes of a `FluxTransformer2DModel`."""

    in_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool
    axes_dims_rope: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim or len(self.axes_dims_rope) != 3:
            raise ValueError(f"{self.axes_dims_rope=} must be three sizes that add up to {self.attention_head_dim=}.")
        if self.in_channels % 4:
            raise ValueError(f"{self.in_channels=} must be a multiple of 4: latents are packed in 2 x 2 patches.")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "FluxConfig":
        """From diffusers' config.json; what it omits takes diffusers' defaults, unknown fields are ignored.

        Raises:
            ValueError: a variant whose input is not its output (FLUX.1-Fill, -Canny, -Depth).
        """
        defaults = {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": False,
        }
        known = {name: config.get(name, default) for name, default in defaults.items()}
        out_channels, patch_size = config.get("out_channels"), config.get("patch_size", 1)
        if out_channels not in (None, known["in_channels"]) or patch_size != 1:
            raise ValueError(
                f"Only text-to-image FLUX.1 is supported: in_channels={known['in_channels']}, {out_channels=}, "
                f"{patch_size=} must be equal channels and patch size 1."
            )
        return cls(**known, axes_dims_rope=tuple(config.get("axes_dims_rope") or (16, 56, 56)))

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of one token; diffusers packs them in the pipeline and says 1 in the config."""
        return 2

    @property
    def token_channels(self) -> int:
        return self.in_channels

    @property
    def attention_rows(self) -> Rows:
        double = self.num_layers
        return (tuple(range(double)), ()), (tuple(range(double, double + self.num_single_layers)), ())

    def attention_layers(self, num_text: int, num_visual: int) -> dict[str, Layout]:
        """Every attention call by name, in order of execution."""
        names = [f"double.{i}" for i in range(self.num_layers)] + [f"single.{i}" for i in range(self.num_single_layers)]
        return dict.fromkeys(names, Layout(num_text, num_visual, text_first=True))


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel from one norm, over the joint sequence (ViT-22B, arXiv 2302.05442, section 2)."""

    def __init__(self, width: int, num_heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = AdaLN(width, 1, dtype=dtype, rngs=rngs)
        self.attn = Attention(width, num_heads, qk_norm=True, dtype=dtype, rngs=rngs)
        self.ff = MLP(width, 4 * width, down_bias=False, dtype=dtype, rngs=rngs)  # to_out carries the common bias

    def __call__(
        self,
        x: Float[Array, "B S D"],
        vector: Float[Array, "B D"],
        layout: Layout,
        *,
        rope: Rope,
        attend: Attend,
        memory: Memory = NOTHING,
        rows: Memory = NOTHING,
    ) -> tuple[Float[Array, "B S D"], Memory]:
        (modulation,) = self.norm(vector)
        normed = modulation(layer_norm(x))

        def project(heads: Int[Array, " n"] | None = None) -> tuple[Heads, Heads, Heads]:
            q, k, v = self.attn.visual(normed, heads)
            return rotate(q, rope), rotate(k, rope), v

        out, remembered = attend(project, layout, memory[0], rows[0])
        x = x + modulation.gate * (self.attn.to_out(merge_heads(out)) + self.ff(normed))
        return x, (remembered, None)


def clip_float16(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Residuals outgrow float16 in some FLUX prompts; diffusers clips them at its largest finite value."""
    return jnp.clip(x, -65504, 65504) if x.dtype == jnp.float16 else x


class FluxTransformer(nnx.Module):
    """Predicts the velocity of every visual token."""

    text_first = True

    def __init__(self, config: FluxConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        to = {"dtype": dtype, "rngs": rngs}
        width, heads = config.width, config.num_attention_heads
        self.dtype = jnp.dtype(dtype)
        self.attention_rows = config.attention_rows
        self.x_embedder = linear(config.in_channels, width, **to)
        self.context_embedder = linear(config.joint_attention_dim, width, **to)
        self.timestep_embedder = MLP(256, width, width, activation=jax.nn.silu, **to)
        self.guidance_embedder = (
            MLP(256, width, width, activation=jax.nn.silu, **to) if config.guidance_embeds else None
        )
        self.text_embedder = MLP(config.pooled_projection_dim, width, width, activation=jax.nn.silu, **to)
        self.transformer_blocks = stack(
            config.num_layers, lambda r: JointBlock(width, heads, qk_norm=True, dtype=dtype, rngs=r), rngs
        )
        self.single_transformer_blocks = stack(
            config.num_single_layers, lambda r: SingleBlock(width, heads, dtype=dtype, rngs=r), rngs
        )
        self.norm_out = AdaLNOut(width, **to)
        self.proj_out = linear(width, config.in_channels, **to)

    def __call__(
        self,
        tokens: Float[Array, "B V C"],
        text: Float[Array, "B T E"],
        pooled: Float[Array, "B P"],
        positions: Rope,
        timestep: Float[Array, "#B 256"],
        guidance: Float[Array, "#B 256"] | None = None,
        *,
        skip: None = None,
        unroll: int | bool = 1,
        implementation: str | None = None,
    ) -> Float[Array, "B V C"]:
        """Velocity of packed latents, with dense attention.

        Args:
            tokens: latents in patches of (channel, row, column), `patches.patchify`.
            text: T5 states; pooled: CLIP's pooled state.
            positions: `patches.rope_table` for the text and the image's patches.
            timestep, guidance: `layers.sinusoid` of 1000 sigma and 1000 guidance; guidance for FLUX.1-dev only.
        """
        args = tokens, text, pooled, positions, timestep, guidance
        return self.velocity(*args, Dense(implementation), skip=skip, unroll=unroll)[0]

    def velocity(
        self,
        tokens: Float[Array, "B V C"],
        text: Float[Array, "B T E"],
        pooled: Float[Array, "B P"],
        positions: Rope,
        timestep: Float[Array, "#B 256"],
        guidance: Float[Array, "#B 256"] | None,
        attend: Attend,
        memory: tuple[Memory, ...] | None = None,
        rows: tuple[Memory, ...] | None = None,
        *,
        skip: None = None,
        unroll: int | bool = 1,
    ) -> tuple[Float[Array, "B V C"], tuple[Memory, ...]]:
        """As `__call__`, with any attention, and what it remembers: one entry for double blocks, one for single."""
        if skip is not None:
            raise NotImplementedError("Skip-layer guidance is defined for SD3, not for FLUX.")
        layout = Layout(num_text=text.shape[1], num_visual=tokens.shape[1], text_first=self.text_first)
        visual, context = self.x_embedder(tokens.astype(self.dtype)), self.context_embedder(text)
        vector = self.timestep_embedder(timestep.astype(self.dtype)) + self.text_embedder(pooled)
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("This FLUX model embeds its guidance (guidance_embeds): guidance must not be None.")
            vector = vector + self.guidance_embedder(guidance.astype(self.dtype))

        def double(block: JointBlock, carry: tuple[Array, Array, Memory], rows: Memory) -> tuple[Array, Array, Memory]:
            visual, context, memory = carry
            visual, context, memory = block(
                visual, context, vector, layout, rope=positions, attend=attend, memory=memory, rows=rows
            )
            return visual, clip_float16(context), memory

        def single(block: SingleBlock, carry: tuple[Array, Memory], rows: Memory) -> tuple[Array, Memory]:
            x, memory = carry
            x, memory = block(x, vector, layout, rope=positions, attend=attend, memory=memory, rows=rows)
            return clip_float16(x), memory

        memory, rows = memory or (NOTHING, NOTHING), rows or (NOTHING, NOTHING)
        blocks, streams = self.transformer_blocks, (visual, context, memory[0])
        visual, context, first = run_blocks(blocks, double, streams, rows[0], unroll=unroll)
        joined = jnp.concatenate([context, visual], axis=1), memory[1]
        x, second = run_blocks(self.single_transformer_blocks, single, joined, rows[1], unroll=unroll)
        return self.proj_out(self.norm_out(x[:, layout.visual], vector)), (first, second)
