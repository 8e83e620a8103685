"""Rules for what SD3, FLUX and HunyuanVideo name alike: joint and single blocks, embedders, the last layer."""

from functools import partial

import numpy as np

from dfa2_jax.weights.rules import Rule, dense, linear, norm


def mlp(key: str, target: str) -> list[Rule]:
    """diffusers' `FeedForward`."""
    return dense(rf"{key}\.net\.0\.proj", f"{target}.up") + dense(rf"{key}\.net\.2", f"{target}.down")


def joint_blocks(target: str) -> list[Rule]:
    """SD3's blocks and FLUX's double blocks, under `target` of the model."""
    block = r"transformer_blocks\.(?P<layer>\d+)\."
    return [
        *dense(block + r"norm1\.linear", target + "visual.norm.linear"),
        *dense(block + r"norm1_context\.linear", target + "text.norm.linear"),
        *dense(block + r"(?P<attn>attn2?)\.(?P<name>to_[qkv])", target + r"visual.\g<attn>.\g<name>"),
        *dense(block + r"(?P<attn>attn2?)\.to_out\.0", target + r"visual.\g<attn>.to_out"),
        *norm(block + r"(?P<attn>attn2?)\.(?P<name>norm_[qk])", target + r"visual.\g<attn>.\g<name>"),
        *dense(block + r"attn\.add_(?P<name>[qkv])_proj", target + r"text.attn.to_\g<name>"),
        *dense(block + r"attn\.to_add_out", target + "text.attn.to_out"),
        *norm(block + r"attn\.norm_added_(?P<name>[qk])", target + r"text.attn.norm_\g<name>"),
        *mlp(block + r"ff", target + "visual.ff"),
        *mlp(block + r"ff_context", target + "text.ff"),
    ]


def attention_columns(x: np.ndarray) -> np.ndarray:
    """The part of a single block's `proj_out`, [D, D + 4 D], that reads the attention: a kernel [D, D]."""
    return x[:, : x.shape[0]].T


def mlp_columns(x: np.ndarray) -> np.ndarray:
    """The part of a single block's `proj_out`, [D, D + 4 D], that reads the MLP: a kernel [4 D, D]."""
    return x[:, x.shape[0] :].T


def matrix(key: str, target: str) -> Rule:
    """A matrix without its bias."""
    return Rule(rf"{key}\.weight", f"{target}.weight.kernel", linear)


def third(x: np.ndarray, number: int) -> np.ndarray:
    """Rows of queries', keys' or values' part of a matrix [3 D, D]: a kernel [D, D]."""
    size = len(x) // 3
    return x[number * size : (number + 1) * size].T


def thirds(key: str, target: str) -> list[Rule]:
    """A matrix of queries, keys and values, fused."""
    return [
        Rule(rf"{key}\.weight", f"{target}.to_{name}.weight.kernel", partial(third, number=number))
        for number, name in enumerate("qkv")
    ]


def scale_before_shift(x: np.ndarray) -> np.ndarray:
    """A matrix whose first half of rows makes shifts, where diffusers' makes scales: a kernel."""
    return np.concatenate(np.split(x, 2)[::-1]).T


SINGLE = r"single_transformer_blocks\.(?P<layer>\d+)\."

SINGLE_BLOCKS = [
    *dense(SINGLE + r"norm\.linear", "single_transformer_blocks.norm.linear"),
    *dense(SINGLE + r"attn\.(?P<name>to_[qkv])", r"single_transformer_blocks.attn.\g<name>"),
    *norm(SINGLE + r"attn\.(?P<name>norm_[qk])", r"single_transformer_blocks.attn.\g<name>"),
    *dense(SINGLE + r"proj_mlp", "single_transformer_blocks.ff.up"),
    Rule(SINGLE + r"proj_out\.weight", "single_transformer_blocks.attn.to_out.weight.kernel", attention_columns),
    Rule(SINGLE + r"proj_out\.weight", "single_transformer_blocks.ff.down.weight.kernel", mlp_columns),
    Rule(SINGLE + r"proj_out\.bias", "single_transformer_blocks.attn.to_out.bias"),
]

EMBEDDERS = [
    *dense(r"time_text_embed\.(?P<name>\w+_embedder)\.linear_1", r"\g<name>.up"),
    *dense(r"time_text_embed\.(?P<name>\w+_embedder)\.linear_2", r"\g<name>.down"),
    *dense(r"(?P<name>context_embedder|x_embedder|proj_out)", r"\g<name>"),
    *dense(r"norm_out\.linear", "norm_out.linear"),
]
