"""The keys of a diffusers `SD3Transformer2DModel`."""

from dfa2_jax.nn.rules import EMBEDDERS, joint_blocks
from dfa2_jax.weights.rules import Rule, conv, table

RULES = [
    Rule(r"pos_embed\.pos_embed", "pos_embed", table),
    Rule(r"pos_embed\.proj\.weight", "patch_embed.kernel", conv),
    Rule(r"pos_embed\.proj\.bias", "patch_embed.bias"),
    *EMBEDDERS,
    *joint_blocks("segments."),
]
