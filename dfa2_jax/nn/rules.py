"""Rules for what SD3 and FLUX name alike: joint blocks, embedders, the last layer."""

from dfa2_jax.weights.rules import Rule, dense, norm


def mlp(key: str, target: str) -> list[Rule]:
    """diffusers' `FeedForward`."""
    return dense(rf"{key}\.net\.0\.proj", f"{target}.up") + dense(rf"{key}\.net\.2", f"{target}.down")


def joint_blocks(target: str) -> list[Rule]:
    """SD3's blocks and FLUX's double blocks."""
    block = r"transformer_blocks\.(?P<layer>\d+)\."
    return [
        *dense(block + r"(?P<name>norm1|norm1_context)\.linear", target + r"\g<name>.linear"),
        *dense(block + r"attn\.(?P<name>to_[qkv]|add_[qkv]_proj|to_add_out)", target + r"attn.\g<name>"),
        *dense(block + r"attn2\.(?P<name>to_[qkv])", target + r"attn2.\g<name>"),
        *dense(block + r"(?P<name>attn2?)\.to_out\.0", target + r"\g<name>.to_out"),
        *norm(block + r"(?P<attn>attn2?)\.(?P<name>norm_(added_)?[qk])", target + r"\g<attn>.\g<name>"),
        *mlp(block + r"(?P<name>ff|ff_context)", target + r"\g<name>"),
    ]


EMBEDDERS = [
    *dense(r"time_text_embed\.(?P<name>\w+_embedder)\.linear_1", r"\g<name>.up"),
    *dense(r"time_text_embed\.(?P<name>\w+_embedder)\.linear_2", r"\g<name>.down"),
    *dense(r"(?P<name>context_embedder|x_embedder|proj_out)", r"\g<name>"),
    *dense(r"norm_out\.linear", "norm_out.linear"),
]
