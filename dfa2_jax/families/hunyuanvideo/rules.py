"""The keys of a diffusers `HunyuanVideoTransformer3DModel`."""

import numpy as np

from dfa2_jax.nn.rules import EMBEDDERS, SINGLE_BLOCKS, joint_blocks, mlp
from dfa2_jax.weights.rules import Rule, dense, norm


def of_patches(x: np.ndarray) -> np.ndarray:
    """A convolution of patches [D, C, frames, rows, columns] as a kernel of tokens, [C frames rows columns, D]."""
    return x.reshape(x.shape[0], -1).T


BLOCK = r"context_embedder\.token_refiner\.refiner_blocks\.(?P<layer>\d+)\."

RULES = [
    Rule(r"x_embedder\.proj\.weight", "x_embedder.weight.kernel", of_patches),
    Rule(r"x_embedder\.proj\.bias", "x_embedder.bias"),
    *dense(r"context_embedder\.time_text_embed\.(?P<name>\w+_embedder)\.linear_1", r"context_embedder.\g<name>.up"),
    *dense(r"context_embedder\.time_text_embed\.(?P<name>\w+_embedder)\.linear_2", r"context_embedder.\g<name>.down"),
    *dense(r"context_embedder\.proj_in", "context_embedder.proj_in"),
    *norm(BLOCK + r"(?P<name>norm[12])", r"context_embedder.blocks.\g<name>"),
    *dense(BLOCK + r"attn\.(?P<name>to_[qkv])", r"context_embedder.blocks.\g<name>"),
    *dense(BLOCK + r"attn\.to_out\.0", "context_embedder.blocks.to_out"),
    *mlp(BLOCK + "ff", "context_embedder.blocks.ff"),
    *dense(BLOCK + r"norm_out\.linear", "context_embedder.blocks.gates"),
    *EMBEDDERS,
    *joint_blocks("transformer_blocks."),
    *SINGLE_BLOCKS,
]
