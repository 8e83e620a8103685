"""The keys of a diffusers `FluxTransformer2DModel`."""

from dfa2_jax.nn.rules import EMBEDDERS, SINGLE_BLOCKS, joint_blocks

RULES = [*EMBEDDERS, *joint_blocks("transformer_blocks."), *SINGLE_BLOCKS]
