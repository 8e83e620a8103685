"""The joint attention block that SD3 and FLUX share, and its attention projections."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.attention import NOTHING, Attend, Heads, Memory
from dfa2_jax.nn.layers import MLP, AdaLN, AdaLNOut, Linear, RMSNorm, layer_norm, linear, merge_heads
from pallas_kernels.layout import Layout

Rope = tuple[Float[Array, "S half"], Float[Array, "S half"]]


class Attention(nnx.Module):
    """Projections around one attention call: of the visual tokens, and with `joint` of the text tokens too.

    `text_out=False` leaves out the text's output projection (the last SD3 block uses text as keys only);
    `qk_norm=None` leaves queries and keys as they are (SD3-medium).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool,
        joint: bool = False,
        text_out: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def project() -> Linear:
            return linear(width, width, dtype=dtype, rngs=rngs)

        def norm() -> RMSNorm | None:
            return RMSNorm(width // num_heads, dtype=dtype) if qk_norm else None

        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v, self.to_out = project(), project(), project(), project()
        self.norm_q, self.norm_k = norm(), norm()
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = project(), project(), project()
            self.norm_added_q, self.norm_added_k = norm(), norm()
        if text_out:
            self.to_add_out = project()

    def visual(self, x: Float[Array, "B T D"], heads: Int[Array, " n"] | None = None) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values, of all heads or of those named."""
        return self._heads(x, heads, self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k)

    def text(self, x: Float[Array, "B T D"], heads: Int[Array, " n"] | None = None) -> tuple[Heads, Heads, Heads]:
        to = self.add_q_proj, self.add_k_proj, self.add_v_proj
        return self._heads(x, heads, *to, self.norm_added_q, self.norm_added_k)

    def _heads(self, x, heads, to_q, to_k, to_v, norm_q, norm_k) -> tuple[Heads, Heads, Heads]:
        q, k, v = (to.heads(x, self.num_heads, heads) for to in (to_q, to_k, to_v))
        return (q, k, v) if norm_q is None else (norm_q(q), norm_k(k), v)


def rotate(x: Heads, rope: Rope) -> Heads:
    """Rotary position embedding on interleaved pairs, in float32 (RoFormer, arXiv 2104.09864, section 3.2)."""
    cos, sin = (table[None, :, None] for table in rope)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def join(visual: Array, text: Array, layout: Layout) -> Array:
    return jnp.concatenate([text, visual] if layout.text_first else [visual, text], axis=1)


class JointBlock(nnx.Module):
    """MMDiT block (Stable Diffusion 3, arXiv 2403.03206, figure 2b): two streams, one attention.

    `dual` adds SD3.5's second attention over visual tokens alone; in the `last` SD3 block the text is only read.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool,
        dual: bool = False,
        last: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        to = {"dtype": dtype, "rngs": rngs}
        self.last = last
        self.norm1 = AdaLN(width, 3 if dual else 2, **to)
        self.norm1_context: Any = AdaLNOut(width, **to) if last else AdaLN(width, 2, **to)
        self.attn = Attention(width, num_heads, qk_norm=qk_norm, joint=True, text_out=not last, **to)
        self.attn2 = Attention(width, num_heads, qk_norm=qk_norm, **to) if dual else None
        self.ff = MLP(width, 4 * width, **to)
        self.ff_context: Any = None if last else MLP(width, 4 * width, **to)

    def __call__(
        self,
        visual: Float[Array, "B V D"],
        text: Float[Array, "B T D"],
        vector: Float[Array, "B D"],
        layout: Layout,
        *,
        rope: Rope | None = None,
        attend: Attend,
        memory: Memory = NOTHING,
        rows: Memory = NOTHING,
    ) -> tuple[Float[Array, "B V D"], Float[Array, "B T D"], Memory]:
        """Both streams, and what the attentions remember: `memory` and `rows` hold one entry for each of them."""
        attn, mlp, *attn2 = self.norm1(vector)
        normed = layer_norm(visual)
        if self.last:
            text_attn = text_mlp = None
            text_in = self.norm1_context(text, vector)
        else:
            text_attn, text_mlp = self.norm1_context(vector)
            text_in = text_attn(layer_norm(text))

        def project(heads: Int[Array, " n"] | None = None) -> tuple[Heads, Heads, Heads]:
            pairs = zip(self.attn.visual(attn(normed), heads), self.attn.text(text_in, heads), strict=True)
            q, k, v = (join(a, b, layout) for a, b in pairs)
            return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

        out, first = attend(project, layout, memory[0], rows[0])
        out, second = merge_heads(out), None
        visual = visual + attn.gate * self.attn.to_out(out[:, layout.visual])

        if self.attn2 is not None:
            project_visual = partial(self.attn2.visual, attn2[0](normed))
            only_visual = Layout(num_text=0, num_visual=visual.shape[1], text_first=layout.text_first)
            out2, second = attend(project_visual, only_visual, memory[1], rows[1])
            visual = visual + attn2[0].gate * self.attn2.to_out(merge_heads(out2))
        visual = visual + mlp.gate * self.ff(mlp(layer_norm(visual)))

        if text_attn is not None and text_mlp is not None:
            text = text + text_attn.gate * self.attn.to_add_out(out[:, layout.text])
            text = text + text_mlp.gate * self.ff_context(text_mlp(layer_norm(text)))
        return visual, text, (first, second)
