"""The keys of a diffusers `FluxTransformer2DModel`, and other names of its matrices that LoRAs have."""

from functools import partial

import numpy as np

from dfa2_jax.nn.rules import (
    EMBEDDERS,
    SINGLE_BLOCKS,
    attention_columns,
    joint_blocks,
    matrix,
    mlp_columns,
    scale_before_shift,
    thirds,
)
from dfa2_jax.weights.rules import Rule

RULES = [*EMBEDDERS, *joint_blocks("transformer_blocks."), *SINGLE_BLOCKS]


def sevenths(x: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows of a single block's first matrix, [3 D + 4 D, D], as a kernel."""
    size = len(x) // 7
    return x[start * size : stop * size].T


DOUBLE, SINGLE = (rf"{kind}_blocks\.(?P<layer>\d+)\." for kind in ("double", "single"))
STREAMS = {"img": "transformer_blocks.visual.", "txt": "transformer_blocks.text."}
SINGLE_TARGET = "single_transformer_blocks."
FIRST = {"attn.to_q": (0, 1), "attn.to_k": (1, 2), "attn.to_v": (2, 3), "ff.up": (3, 7)}


def single_output(key: str) -> list[Rule]:
    """A single block's last matrix, of both of its parts."""
    return [
        Rule(rf"{key}\.weight", f"{SINGLE_TARGET}attn.to_out.weight.kernel", attention_columns),
        Rule(rf"{key}\.weight", f"{SINGLE_TARGET}ff.down.weight.kernel", mlp_columns),
    ]


def double_stream(stream: str, target: str) -> list[Rule]:
    return [
        matrix(rf"{DOUBLE}{stream}_mod\.lin", f"{target}norm.linear"),
        *thirds(rf"{DOUBLE}{stream}_attn\.qkv", f"{target}attn"),
        matrix(rf"{DOUBLE}{stream}_attn\.proj", f"{target}attn.to_out"),
        matrix(rf"{DOUBLE}{stream}_mlp\.0", f"{target}ff.up"),
        matrix(rf"{DOUBLE}{stream}_mlp\.2", f"{target}ff.down"),
    ]


ORIGINAL = [
    matrix("img_in", "x_embedder"),
    matrix("txt_in", "context_embedder"),
    *(
        matrix(rf"{key}\.{layer}", f"{name}_embedder.{own}")
        for key, name in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for layer, own in (("in_layer", "up"), ("out_layer", "down"))
    ),
    *(rule for stream, target in STREAMS.items() for rule in double_stream(stream, target)),
    matrix(SINGLE + r"modulation\.lin", SINGLE_TARGET + "norm.linear"),
    *(
        Rule(SINGLE + r"linear1\.weight", f"{SINGLE_TARGET}{name}.weight.kernel", partial(sevenths, start=a, stop=b))
        for name, (a, b) in FIRST.items()
    ),
    *single_output(SINGLE + "linear2"),
    Rule(r"final_layer\.adaLN_modulation\.1\.weight", "norm_out.linear.weight.kernel", scale_before_shift),
    matrix(r"final_layer\.linear", "proj_out"),
]
"""Matrices as Black Forest Labs name them."""

XLABS = [
    *thirds(DOUBLE + r"processor\.qkv_lora1", STREAMS["img"] + "attn"),
    *thirds(DOUBLE + r"processor\.qkv_lora2", STREAMS["txt"] + "attn"),
    matrix(DOUBLE + r"processor\.proj_lora1", STREAMS["img"] + "attn.to_out"),
    matrix(DOUBLE + r"processor\.proj_lora2", STREAMS["txt"] + "attn.to_out"),
    *thirds(SINGLE + r"processor\.qkv_lora", SINGLE_TARGET + "attn"),
    *single_output(SINGLE + r"processor\.proj_lora"),
]
"""Names of XLabs's LoRAs."""
