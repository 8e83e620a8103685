"""How the keys of torch state dicts map onto our parameters: one table per class of a diffusers folder.

A rule is a regular expression over a whole key, the path of the parameter, and how the array turns. A group named
`layer` is the number of a block: equal blocks are stacked, so block 3 fills row 3 of its parameter (`place`).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dfa2_jax.checkpoint import Block, Leaf
from dfa2_jax.faults import raise_faults
from dfa2_jax.models.sd3 import SD3Config

from .safetensors_mmap import DTYPES, Tensor

Turn = Callable[[np.ndarray], np.ndarray]


def same(x: np.ndarray) -> np.ndarray:
    return x


def linear(x: np.ndarray) -> np.ndarray:
    """torch's [out, in] as [in, out]: a view, turned by whoever copies it."""
    return x.T


def conv(x: np.ndarray) -> np.ndarray:
    """torch's [out, in, height, width] as [height, width, in, out]."""
    return x.transpose(2, 3, 1, 0)


def table(x: np.ndarray) -> np.ndarray:
    """[1, cells, D] as [cells, D]."""
    return x.squeeze(0)


def attention_columns(x: np.ndarray) -> np.ndarray:
    """Of FLUX's `proj_out`, [D, D + 4 D], the part that reads the attention."""
    return x[:, : x.shape[0]].T


def mlp_columns(x: np.ndarray) -> np.ndarray:
    """Of FLUX's `proj_out`, [D, D + 4 D], the part that reads the MLP."""
    return x[:, x.shape[0] :].T


@dataclass(frozen=True)
class Rule:
    """Source keys that fullmatch `key` fill `target`; None: a known key that is left out."""

    key: str
    target: str | None
    turn: Turn = same


def dense(key: str, target: str) -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{target}.kernel", linear), Rule(rf"{key}\.bias", f"{target}.bias")]


def norm(key: str, target: str) -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{target}.scale"), Rule(rf"{key}\.bias", f"{target}.bias")]


def conv2d(key: str, target: str) -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{target}.kernel", conv), Rule(rf"{key}\.bias", f"{target}.bias")]


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

SINGLE = r"single_transformer_blocks\.(?P<layer>\d+)\."

CLIP_LAYER = r"encoder\.layers\.(?P<layer>\d+)\."
CLIP_TEXT = [
    Rule(r"embeddings\.(?P<name>token|position)_embedding\.weight", r"\g<name>_embedding"),
    Rule(r"embeddings\.position_ids", None),
    *norm(CLIP_LAYER + r"(?P<name>layer_norm[12])", r"layers.\g<name>"),
    *dense(CLIP_LAYER + r"self_attn\.(?P<name>\w+_proj)", r"layers.self_attn.\g<name>"),
    *dense(CLIP_LAYER + r"mlp\.fc1", "layers.mlp.up"),
    *dense(CLIP_LAYER + r"mlp\.fc2", "layers.mlp.down"),
    *norm(r"final_layer_norm", "final_layer_norm"),
]
# Folders saved by transformers 4 have the prefix, those saved by 5 do not, except with a projection.
CLIP = [Rule(r"(text_model\.)?" + rule.key, rule.target, rule.turn) for rule in CLIP_TEXT]

T5_LAYER = r"encoder\.block\.(?P<layer>\d+)\.layer\."

VAE_RESNET = r"(?P<at>(en|de)coder\.(mid_block|(up|down)_blocks\.\d+)\.resnets\.\d+)\."
VAE_ATTENTION = r"(?P<at>(en|de)coder\.mid_block)\.attentions\.0\."

RULES: dict[str, list[Rule]] = {
    "SD3Transformer2DModel": [
        Rule(r"pos_embed\.pos_embed", "pos_embed", table),
        Rule(r"pos_embed\.proj\.weight", "patch_embed.kernel", conv),
        Rule(r"pos_embed\.proj\.bias", "patch_embed.bias"),
        *EMBEDDERS,
        *joint_blocks("segments."),
    ],
    "FluxTransformer2DModel": [
        *EMBEDDERS,
        *joint_blocks("transformer_blocks."),
        *dense(SINGLE + r"norm\.linear", "single_transformer_blocks.norm.linear"),
        *dense(SINGLE + r"attn\.(?P<name>to_[qkv])", r"single_transformer_blocks.attn.\g<name>"),
        *norm(SINGLE + r"attn\.(?P<name>norm_[qk])", r"single_transformer_blocks.attn.\g<name>"),
        *dense(SINGLE + r"proj_mlp", "single_transformer_blocks.ff.up"),
        Rule(SINGLE + r"proj_out\.weight", "single_transformer_blocks.attn.to_out.kernel", attention_columns),
        Rule(SINGLE + r"proj_out\.weight", "single_transformer_blocks.ff.down.kernel", mlp_columns),
        Rule(SINGLE + r"proj_out\.bias", "single_transformer_blocks.attn.to_out.bias"),
    ],
    "AutoencoderKL": [
        *conv2d(r"(?P<name>(en|de)coder\.conv_(in|out)|(post_)?quant_conv)", r"\g<name>"),
        *norm(r"(?P<name>(en|de)coder\.conv_norm_out)", r"\g<name>"),
        *norm(VAE_RESNET + r"(?P<name>norm[12])", r"\g<at>.\g<name>"),
        *conv2d(VAE_RESNET + r"(?P<name>conv[12]|conv_shortcut)", r"\g<at>.\g<name>"),
        *norm(VAE_ATTENTION + r"group_norm", r"\g<at>.attention.group_norm"),
        *dense(VAE_ATTENTION + r"(?P<name>to_[qkv])", r"\g<at>.attention.\g<name>"),
        *dense(VAE_ATTENTION + r"to_out\.0", r"\g<at>.attention.to_out"),
        *conv2d(r"(?P<at>(en|de)coder\.\w+_blocks\.\d+)\.(?P<to>up|down)samplers\.0\.conv", r"\g<at>.\g<to>sampler"),
    ],
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": [*CLIP, *dense(r"text_projection", "text_projection")],
    "T5EncoderModel": [
        Rule(r"shared\.weight", "shared"),
        Rule(r"encoder\.embed_tokens\.weight", None),  # tied to shared.weight
        Rule(r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", "relative_attention_bias"),
        *dense(T5_LAYER + r"0\.SelfAttention\.(?P<name>[qkvo])", r"layers.attention.\g<name>"),
        *norm(T5_LAYER + r"0\.layer_norm", "layers.attention_norm"),
        *dense(T5_LAYER + r"1\.DenseReluDense\.(?P<name>wi_[01]|wo)", r"layers.\g<name>"),
        *norm(T5_LAYER + r"1\.layer_norm", "layers.ff_norm"),
        *norm(r"encoder\.final_layer_norm", "final_layer_norm"),
    ],
}


class Piece(NamedTuple):
    """What fills a parameter, or row `layer` of it."""

    path: str
    layer: int | None
    tensor: Tensor
    turn: Turn


def place(class_name: str, config: Mapping[str, Any], target: str, layer: int | None) -> tuple[str, int | None]:
    """Path and row of a block's parameter. SD3's blocks lie in segments of equal ones."""
    if layer is None or class_name != "SD3Transformer2DModel":
        return target, layer
    segment, row = SD3Config.from_json(dict(config)).locate(layer)
    return target.replace("segments.", f"segments.{segment}.", 1), row


def pieces_of(key: str, tensor: Tensor, class_name: str, config: Mapping[str, Any]) -> list[Piece] | None:
    """Where a key's tensor goes; None if no rule knows the key."""
    found, known = [], False
    for rule in RULES[class_name]:
        if match := re.fullmatch(rule.key, key):
            known = True
            if rule.target is None:
                continue
            layer = match.groupdict().get("layer")
            path, row = place(class_name, config, match.expand(rule.target), None if layer is None else int(layer))
            found.append(Piece(path, row, tensor, rule.turn))
    return found if known else None


def map_weights(
    tensors: Mapping[str, Tensor],
    class_name: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    headline: str,
) -> dict[str, Leaf]:
    """Every parameter's leaf, filled from the tensors: each key used once, each row filled once, all shapes equal.

    Args:
        shapes: of the parameters, by dotted path; stacked ones with their leading layer axis.
        headline: names the folder, in front of the faults.

    Raises:
        CheckpointError: all faults together.
    """
    rows: dict[str, dict[int | None, Piece]] = {}
    unknown, duplicate, wrong = [], [], []
    for key, tensor in tensors.items():
        try:
            pieces = pieces_of(key, tensor, class_name, config)
        except ValueError:  # a block beyond the last
            pieces = None
        if pieces is None or any(piece.path not in shapes for piece in pieces):
            unknown.append(key)
            continue
        for piece in pieces:
            taken = rows.setdefault(piece.path, {})
            if piece.layer in taken:
                duplicate.append(f"{key} and {taken[piece.layer].tensor.key}")
            taken[piece.layer] = piece

    leaves, missing = {}, []
    for path, shape in shapes.items():
        filled = rows.get(path, {})
        stacked = None not in filled and bool(filled)
        wanted: list[int | None] = list(range(shape[0])) if stacked else [None]
        missing += [path if row is None else f"{path}, layer {row}" for row in wanted if row not in filled]
        unknown += [piece.tensor.key for row, piece in filled.items() if row not in wanted]
        expected = shape[1:] if stacked else shape
        for row in wanted:
            if row in filled and (fault := shape_fault(filled[row], expected)):
                wrong.append(fault)
        leaves[path] = (shape, [filled[row] for row in wanted if row in filled])
    raise_faults(
        headline,
        {"unknown keys": unknown, "missing parameters": missing, "duplicate keys": duplicate, "wrong shapes": wrong},
    )
    return {path: make_leaf(shape, pieces) for path, (shape, pieces) in leaves.items()}


def shape_fault(piece: Piece, expected: tuple[int, ...]) -> str | None:
    try:
        got = piece.turn(np.broadcast_to(np.int8(0), piece.tensor.shape)).shape
    except (ValueError, IndexError):
        got = ()
    if got == expected:
        return None
    return f"{piece.tensor.key} is {list(piece.tensor.shape)}, which does not fill {piece.path} {list(expected)}"


BLOCK_BYTES = 2**26
"""Of a parameter that is no stack of layers: T5-XXL's embeddings (263 MB) go in blocks of rows, too."""


def make_leaf(shape: tuple[int, ...], pieces: list[Piece]) -> Leaf:
    dtype = DTYPES[pieces[0].tensor.dtype]
    if pieces[0].layer is not None:
        blocks = [Block(piece.tensor.source, piece.layer or 0, partial(read_layer, piece)) for piece in pieces]
    else:
        (piece,) = pieces
        rows = equal_blocks(shape, math.prod(shape) * dtype.itemsize)
        starts = range(0, shape[0], rows) if shape else [0]
        blocks = [Block(piece.tensor.source, start, partial(read_rows, piece, start, rows)) for start in starts]
    return Leaf(shape, dtype, blocks)


def equal_blocks(shape: tuple[int, ...], nbytes: int) -> int:
    """Rows of a block: equal blocks of at most `BLOCK_BYTES`, since a chunk of an array has one size."""
    fewest, rows = -(-nbytes // BLOCK_BYTES), shape[0] if shape else 1
    counts = [count for count in range(max(1, fewest), 4 * fewest + 1) if rows % count == 0]
    return rows // counts[0] if counts else max(1, rows)


def read_layer(piece: Piece) -> np.ndarray:
    return piece.turn(piece.tensor.array())[None]


def read_rows(piece: Piece, start: int, rows: int) -> np.ndarray:
    return piece.turn(piece.tensor.array())[start : start + rows]
