"""The keys of a diffusers `SD3Transformer2DModel`, and other names of its matrices that LoRAs have."""

import numpy as np

from dfa2_jax.nn.rules import EMBEDDERS, joint_blocks, matrix, scale_before_shift, thirds
from dfa2_jax.weights.rules import Rule, conv, linear, table

RULES = [
    Rule(r"pos_embed\.pos_embed", "pos_embed", table),
    Rule(r"pos_embed\.proj\.weight", "patch_embed.kernel", conv),
    Rule(r"pos_embed\.proj\.bias", "patch_embed.bias"),
    *EMBEDDERS,
    *joint_blocks("segments."),
]


def context_modulation(x: np.ndarray) -> np.ndarray:
    """Six parts [6 D, D] in diffusers' order, or the last block's [2 D, D], whose shift comes before its scale."""
    return scale_before_shift(x) if len(x) == 2 * x.shape[1] else linear(x)


BLOCK = r"joint_blocks\.(?P<layer>\d+)\."
STREAMS = {"x": "segments.visual.", "context": "segments.text."}


def stream(name: str, target: str) -> list[Rule]:
    block = rf"{BLOCK}{name}_block\."
    return [
        *thirds(block + r"attn\.qkv", f"{target}attn"),
        matrix(block + r"attn\.proj", f"{target}attn.to_out"),
        matrix(block + r"mlp\.fc1", f"{target}ff.up"),
        matrix(block + r"mlp\.fc2", f"{target}ff.down"),
    ]


ORIGINAL = [
    Rule(r"x_embedder\.proj\.weight", "patch_embed.kernel", conv),
    *(
        matrix(rf"{key}\.mlp\.{layer}", f"{name}_embedder.{own}")
        for key, name in (("t_embedder", "timestep"), ("y_embedder", "text"))
        for layer, own in ((0, "up"), (2, "down"))
    ),
    *(rule for name, target in STREAMS.items() for rule in stream(name, target)),
    *thirds(BLOCK + r"x_block\.attn2\.qkv", STREAMS["x"] + "attn2"),
    matrix(BLOCK + r"x_block\.attn2\.proj", STREAMS["x"] + "attn2.to_out"),
    matrix(BLOCK + r"x_block\.adaLN_modulation\.1", STREAMS["x"] + "norm.linear"),
    Rule(
        BLOCK + r"context_block\.adaLN_modulation\.1\.weight",
        STREAMS["context"] + "norm.linear.weight.kernel",
        context_modulation,
    ),
    Rule(r"final_layer\.adaLN_modulation\.1\.weight", "norm_out.linear.weight.kernel", scale_before_shift),
    matrix(r"final_layer\.linear", "proj_out"),
]
"""Matrices as Stability AI name them."""
