"""One stream of blocks over [visual, text], modulated by time alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dfa2_jax.nn.attention import AttentionCall, Dense, dense_plans
from dfa2_jax.nn.blocks import SingleBlock
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.config import config_from_json
from dfa2_jax.nn.linear import MLP, Linear
from dfa2_jax.nn.norms import AdaLNOut
from dfa2_jax.nn.scan import run_segment, stack
from dfa2_jax.nn.streams import Context
from dfa2_jax.weights.rules import dense, norm
from pallas_kernels import Layout


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    in_channels: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int
    patch_size: int = 1

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ToyConfig":
        return config_from_json(cls, config)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def calls(self, num_text: int, num_visual: int) -> tuple[AttentionCall, ...]:
        layout = Layout(num_text, num_visual, text_first=False)
        return tuple(AttentionCall(f"block.{i}", i, "blocks.attn", i, layout) for i in range(self.num_layers))


@carrier
class ToyConditions:
    """Text alone: nothing pooled, no positions."""

    text: Float[Array | np.ndarray, "B T E"]

    def last(self, count: int) -> "ToyConditions":
        return ToyConditions(self.text[-count:])

    def share(self, rows: Callable[[Any], Any], tokens: Callable[[Any, int], Any]) -> "ToyConditions":
        return ToyConditions(tokens(rows(self.text), 1))


class ToyTransformer(nnx.Module):
    def __init__(self, config: ToyConfig, *, dtype: Any, rngs: nnx.Rngs):
        to = {"dtype": dtype, "rngs": rngs}
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.embed = Linear(config.in_channels, config.width, **to)
        self.embed_text = Linear(config.joint_attention_dim, config.width, **to)
        self.embed_time = MLP(256, config.width, config.width, activation=jax.nn.silu, **to)
        make = lambda rngs: SingleBlock(config.width, config.num_attention_heads, dtype=dtype, rngs=rngs)  # noqa: E731
        self.blocks = stack(config.num_layers, make, rngs)
        self.norm_out = AdaLNOut(config.width, **to)
        self.out = Linear(config.width, config.in_channels, **to)

    def calls(self, num_text: int, num_visual: int) -> tuple[AttentionCall, ...]:
        return self.config.calls(num_text, num_visual)

    def __call__(
        self, tokens, timestep, conditions, attend=None, *, memory=None, plans=None, skipped_blocks=None, unroll=1
    ):
        layout = Layout(num_text=conditions.text.shape[1], num_visual=tokens.shape[1], text_first=False)
        context = Context(self.embed_time(jnp.asarray(timestep).astype(self.dtype)), layout)
        visual = self.embed(jnp.asarray(tokens).astype(self.dtype))
        x = jnp.concatenate([visual, self.embed_text(jnp.asarray(conditions.text))], axis=1)

        def step(block, x, attention):
            return block(x, context, attention)

        plans = plans or dense_plans(self.config.calls(1, 1))
        where = "blocks", self.blocks, step, x, attend or Dense(), memory or {}, plans
        x, memory = run_segment(*where, skipped=skipped_blocks, unroll=unroll)
        return self.out(self.norm_out(x[:, layout.visual], context.vector)), memory


BLOCK = r"blocks\.(?P<layer>\d+)\."
RULES = [
    *dense(r"(?P<name>embed|embed_text|out|norm_out\.linear|embed_time\.(up|down))", r"\g<name>"),
    *dense(BLOCK + r"(?P<name>norm\.linear|attn\.to_(q|k|v|out)|ff\.up|ff\.down)", r"blocks.\g<name>"),
    *norm(BLOCK + r"(?P<name>attn\.norm_[qk])", r"blocks.\g<name>"),
]
