"""What a joint block does to each of its streams, and what is equal in all blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.attention import QKV, Heads
from dfa2_jax.nn.linear import MLP, Linear
from dfa2_jax.nn.modulation import Modulation
from dfa2_jax.nn.norms import AdaLN, AdaLNOut, RMSNorm
from dfa2_jax.nn.weights import merge_heads
from pallas_kernels.layout import Layout
from pallas_kernels.passes import Projected, Rope, normed_qkv, rotate

StreamQKV = tuple[Float[Array, "B _ N H"], Float[Array, "B _ N H"], Float[Array, "B _ N H"]] | Projected
"""A stream's queries, keys and values: with their norms, or before them. Streams differ in length."""


@dataclass(frozen=True)
class Context:
    """Equal in all blocks of a forward: the vector that modulates, where the streams lie, rotary positions.

    num_reference: visual tokens of a reference, which attention sees as text: they lie between text and image.
    """

    vector: Float[Array, "#B D"]
    layout: Layout
    rope: Rope | None = None
    num_reference: int = 0

    @property
    def text(self) -> slice:
        """Tokens of the text stream."""
        whole = self.layout.text
        return slice(whole.start, whole.stop - self.num_reference)

    @property
    def visual(self) -> slice:
        """Tokens of the visual stream."""
        whole = self.layout.visual
        return slice(whole.start - self.num_reference, whole.stop)

    @property
    def visual_alone(self) -> Layout:
        """The layout of an attention that sees no text."""
        return Layout(num_text=0, num_visual=self.layout.num_visual, text_first=self.layout.text_first)

    def joined(self, visual: StreamQKV, text: StreamQKV) -> QKV:
        """Both streams as one sequence."""
        return self.sequence(text, visual) if self.layout.text_first else self.sequence(visual, text)

    def sequence(self, *streams: StreamQKV) -> QKV:
        """Streams in their order, normed and rotated."""
        projected = [stream for stream in streams if isinstance(stream, Projected)]
        if projected:
            return normed_qkv(projected, self.rope)
        q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*streams, strict=True))
        return (q, k, v) if self.rope is None else (rotate(q, self.rope), rotate(k, self.rope), v)


class Projections(nnx.Module):
    """A stream's projections before and after attention.

    qk_norm: norms of queries and keys (not in SD3-medium), of the kind that `norm` makes.
    writes: an output projection; without one the stream is only read.
    """

    to_qkv: Linear | None = None
    """In place of `to_q`, `to_k` and `to_v`, where their weights are one (`nn.quantize`)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool,
        writes: bool = True,
        norm: Callable[..., Any] = RMSNorm,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def project() -> Linear:
            return Linear(width, width, dtype=dtype, rngs=rngs)

        def norms() -> Any:
            return norm(width // num_heads, dtype=dtype) if qk_norm else None

        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.to_out = project() if writes else None
        self.norm_q, self.norm_k = norms(), norms()

    def modulated(self, x: Float[Array, "B T D"], modulation: Modulation) -> Any:
        """The modulated layer norm of x, as `qkv` takes it."""
        return (self.to_qkv or self.to_q).modulated(x, modulation)

    def qkv(self, x: Any, heads: Int[Array, " n"] | None = None) -> StreamQKV:
        """Queries, keys and values, of all heads or of those named; before their norms, where their weights are one."""
        norms = None if self.norm_q is None or self.norm_k is None else (self.norm_q, self.norm_k)
        if self.to_qkv is not None:
            every = None if heads is None else jnp.concatenate([heads + i * self.num_heads for i in range(3)])
            scales = None if norms is None else (norms[0].scale[...], norms[1].scale[...])
            return Projected(self.to_qkv.heads(x, 3 * self.num_heads, every), self.num_heads, scales, heads)
        q, k, v = (to.heads(x, self.num_heads, heads) for to in (self.to_q, self.to_k, self.to_v))
        return (q, k, v) if norms is None else (norms[0](q), norms[1](k), v)

    def out(self, heads: Heads) -> Float[Array, "B T D"]:
        assert self.to_out is not None
        return self.to_out(merge_heads(heads))


class Stream(nnx.Module):
    """One side of a joint block: modulate, attend, write back, feed forward."""

    branches = 2
    """Branches of the modulation: attention and MLP."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = AdaLN(width, type(self).branches, dtype=dtype, rngs=rngs)
        self.attn = Projections(width, num_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.ff = MLP(width, 4 * width, dtype=dtype, rngs=rngs)

    def modulated(self, x: Float[Array, "B T D"], context: Context) -> "Modulated":
        attn, mlp = self.norm(context.vector)
        return Modulated(self, attn, mlp, self.attn.modulated(x, attn))


@dataclass(frozen=True)
class Modulated:
    """A stream in one block: its modulation, and what its queries, keys and values are made of."""

    stream: Stream
    attn: Modulation
    mlp: Modulation
    x: Any
    """As `Projections.modulated` gives it."""

    def qkv(self, heads: Int[Array, " n"] | None = None) -> StreamQKV:
        return self.stream.attn.qkv(self.x, heads)

    def write(self, x: Float[Array, "B T D"], out: Heads) -> Float[Array, "B T D"]:
        return x + self.attn.gate * self.stream.attn.out(out)

    def feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x + self.mlp.gate * self.stream.ff(self.stream.ff.up.modulated(x, self.mlp))


class DualStream(Stream):
    """SD3.5's visual stream: a second attention, over visual tokens alone, with a modulation of its own."""

    branches = 3

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(width, num_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.attn2 = Projections(width, num_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)

    def modulated(self, x: Float[Array, "B T D"], context: Context) -> "DualModulated":
        attn, mlp, attn2 = self.norm(context.vector)
        return DualModulated(self, attn, mlp, self.attn.modulated(x, attn), attn2, self.attn2.modulated(x, attn2))


@dataclass(frozen=True)
class DualModulated(Modulated):
    attn2: Modulation
    x2: Any

    def qkv2(self, heads: Int[Array, " n"] | None = None) -> StreamQKV:
        assert isinstance(self.stream, DualStream)
        return self.stream.attn2.qkv(self.x2, heads)

    def write2(self, x: Float[Array, "B T D"], out: Heads) -> Float[Array, "B T D"]:
        assert isinstance(self.stream, DualStream)
        return x + self.attn2.gate * self.stream.attn2.out(out)


class ReadOnlyStream(nnx.Module):
    """Text in SD3's last block: attention reads it, nothing is written to it."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = AdaLNOut(width, dtype=dtype, rngs=rngs)
        self.attn = Projections(width, num_heads, qk_norm=qk_norm, writes=False, dtype=dtype, rngs=rngs)

    def modulated(self, x: Float[Array, "B T D"], context: Context) -> "ReadOnly":
        return ReadOnly(self, self.norm(x, context.vector))


@dataclass(frozen=True)
class ReadOnly:
    stream: ReadOnlyStream
    x: Float[Array, "B T D"]

    def qkv(self, heads: Int[Array, " n"] | None = None) -> StreamQKV:
        return self.stream.attn.qkv(self.x, heads)

    def write(self, x: Float[Array, "B T D"], out: Any) -> Float[Array, "B T D"]:
        return x

    def feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x
