"""The keys of a diffusers `FluxTransformer2DModel`."""

import numpy as np

from dfa2_jax.nn.rules import EMBEDDERS, joint_blocks
from dfa2_jax.weights.rules import Rule, dense, norm


def attention_columns(x: np.ndarray) -> np.ndarray:
    """The part of FLUX's `proj_out`, [D, D + 4 D], that reads the attention: a kernel [D, D]."""
    return x[:, : x.shape[0]].T


def mlp_columns(x: np.ndarray) -> np.ndarray:
    """The part of FLUX's `proj_out`, [D, D + 4 D], that reads the MLP: a kernel [4 D, D]."""
    return x[:, x.shape[0] :].T


SINGLE = r"single_transformer_blocks\.(?P<layer>\d+)\."

RULES = [
    *EMBEDDERS,
    *joint_blocks("transformer_blocks."),
    *dense(SINGLE + r"norm\.linear", "single_transformer_blocks.norm.linear"),
    *dense(SINGLE + r"attn\.(?P<name>to_[qkv])", r"single_transformer_blocks.attn.\g<name>"),
    *norm(SINGLE + r"attn\.(?P<name>norm_[qk])", r"single_transformer_blocks.attn.\g<name>"),
    *dense(SINGLE + r"proj_mlp", "single_transformer_blocks.ff.up"),
    Rule(SINGLE + r"proj_out\.weight", "single_transformer_blocks.attn.to_out.weight.kernel", attention_columns),
    Rule(SINGLE + r"proj_out\.weight", "single_transformer_blocks.ff.down.weight.kernel", mlp_columns),
    Rule(SINGLE + r"proj_out\.bias", "single_transformer_blocks.attn.to_out.bias"),
]
