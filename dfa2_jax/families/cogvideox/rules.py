"""The keys of a diffusers `CogVideoXTransformer3DModel`."""

import numpy as np

from dfa2_jax.nn.rules import mlp
from dfa2_jax.weights.rules import Rule, dense, norm


def patches(x: np.ndarray) -> np.ndarray:
    """A convolution [D, C, p, p], or a matrix [D, C p p p] of CogVideoX 1.5, as a kernel."""
    return x.reshape(len(x), -1).T


BLOCK = r"transformer_blocks\.(?P<layer>\d+)\."

RULES = [
    Rule(r"patch_embed\.proj\.weight", "patch_embed.weight.kernel", patches),
    Rule(r"patch_embed\.proj\.bias", "patch_embed.bias"),
    *dense(r"patch_embed\.text_proj", "text_proj"),
    Rule(r"patch_embed\.pos_embedding", None),  # computed: `positions.position_table`
    *dense(r"time_embedding\.linear_1", "time_embedding.up"),
    *dense(r"time_embedding\.linear_2", "time_embedding.down"),
    *dense(BLOCK + r"(?P<name>norm[12])\.linear", r"transformer_blocks.\g<name>.linear"),
    *norm(BLOCK + r"(?P<name>norm[12])\.norm", r"transformer_blocks.\g<name>.norm"),
    *dense(BLOCK + r"attn1\.(?P<name>to_[qkv])", r"transformer_blocks.attn.\g<name>"),
    *dense(BLOCK + r"attn1\.to_out\.0", "transformer_blocks.attn.to_out"),
    *norm(BLOCK + r"attn1\.(?P<name>norm_[qk])", r"transformer_blocks.attn.\g<name>"),
    *mlp(BLOCK + r"ff", "transformer_blocks.ff"),
    *norm(r"norm_final", "norm_final"),
    *dense(r"norm_out\.linear", "norm_out.linear"),
    *norm(r"norm_out\.norm", "norm_out.norm"),
    *dense(r"proj_out", "proj_out"),
]
