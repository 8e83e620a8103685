"""Sizes and tokenizers of the model in the box, as its folder states them: diffusers' fields, transformers' files."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from dfa2_jax.encoders.tokenizers import Tokenizer
from dfa2_jax.io.atomic import write_whole
from toy.scenes import scenes

ASSETS = Path(__file__).parents[1] / "assets"
WIDTH, HEADS, LAYERS = 128, 4, 8
TABLE_SIDE = 32
"""Patches along a side of the largest image: 1,024 tokens, 256 pixels."""
CLIP_LENGTH, T5_LENGTH, T5_DEFAULT_LENGTH = 24, 32, 256
"""Tokens. A caption has 14 at most; 256 is what the pipelines pad T5's prompts to when told nothing."""

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_PADDING = {"tokenizer": END, "tokenizer_2": "!"}  # as published: CLIP-L's and bigG's


def words() -> list[str]:
    return sorted({word for scene in scenes() for word in scene.caption.split()})


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of byte-level BPE in CLIP's order; every word of a caption is one token.

    The merges are a file because learning them is not reproducible. They come from tokenizers' `BpeTrainer`, which
    breaks ties by a hash that differs from process to process.
    """
    lines = (ASSETS / "clip_merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [(a, b) for a, b in (line.split(" ") for line in lines)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = ["!"] + alphabet + [byte + "</w>" for byte in alphabet] + [a + b for a, b in merges]  # bigG pads with id 0
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(order), START, END])}
    assert all(word + "</w>" in vocabulary for word in words())
    return vocabulary, merges


@cache
def t5_pieces(known: tuple[str, ...] | None = None) -> list[tuple[str, float]]:
    """Unigram pieces with their scores: whole words, by default those of images, and letters for what is none."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -10.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789.,-'"]
    return special + [("▁" + word, -1.0) for word in known or words()] + letters


def t5_backend(pieces: list[tuple[str, float]]) -> tokenizers.Tokenizer:
    """As transformers' `T5Tokenizer` builds it."""
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return backend


def write_tokenizer(folder: Path, name: str) -> Path:
    """`folder/name` with what `Tokenizer.load` reads: of CLIP the older files, which need no transformers."""
    folder = folder / name
    folder.mkdir()
    if name == "tokenizer_3":
        write_whole(folder / "tokenizer.json", t5_backend(t5_pieces()).to_str(pretty=True))
        settings: dict[str, Any] = {"pad_token": "<pad>", "model_max_length": 512}
    else:
        vocabulary, merges = clip_vocabulary()
        write_whole(folder / "vocab.json", json.dumps(vocabulary))
        write_whole(folder / "merges.txt", "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
        settings = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": CLIP_PADDING[name]}
        settings |= {"model_max_length": CLIP_LENGTH}
    write_whole(folder / "tokenizer_config.json", json.dumps(settings))
    return folder


def token_ids(prompts: list[str]) -> dict[str, np.ndarray]:
    """What the pipeline gives each text encoder, int32 [prompts, tokens], T5's cut to `T5_LENGTH`."""
    lengths = {"": CLIP_LENGTH, "_2": CLIP_LENGTH, "_3": T5_LENGTH}
    with tempfile.TemporaryDirectory() as folder:
        loaded = {suffix: Tokenizer.load(write_tokenizer(Path(folder), f"tokenizer{suffix}")) for suffix in lengths}
    return {f"text_encoder{suffix}": loaded[suffix].encode(prompts, length) for suffix, length in lengths.items()}


def clip_config(activation: str) -> dict[str, Any]:
    size = len(clip_vocabulary()[0])
    return {
        "vocab_size": size,
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "projection_dim": 64,
        "hidden_act": activation,
        "max_position_embeddings": CLIP_LENGTH,
        "bos_token_id": size - 2,
        "eos_token_id": 2,  # the published value: the pooled state is taken at the largest id
        "pad_token_id": size - 1,
    }


@cache
def configs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and config.json of every network, by its name in the folder."""
    return {
        "vae": (
            "AutoencoderKL",
            {
                "down_block_types": ["DownEncoderBlock2D"] * 3,
                "up_block_types": ["UpDecoderBlock2D"] * 3,
                "block_out_channels": [16, 32, 32],
                "layers_per_block": 1,
                "latent_channels": 16,
                "norm_num_groups": 8,
                "sample_size": 128,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            },
        ),
        "transformer": (
            "SD3Transformer2DModel",
            {
                "sample_size": 32,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": LAYERS,
                "attention_head_dim": WIDTH // HEADS,
                "num_attention_heads": HEADS,
                "joint_attention_dim": 96,
                "caption_projection_dim": WIDTH,
                "pooled_projection_dim": 128,
                "pos_embed_max_size": TABLE_SIDE,
                "dual_attention_layers": [0, 1],
                "qk_norm": "rms_norm",
            },
        ),
        "text_encoder": ("CLIPTextModelWithProjection", clip_config("quick_gelu")),
        "text_encoder_2": ("CLIPTextModelWithProjection", clip_config("gelu")),
        "text_encoder_3": (
            "T5EncoderModel",
            {
                "vocab_size": len(t5_pieces()),
                "d_model": 96,
                "d_kv": 16,
                "d_ff": 192,
                "num_layers": 2,
                "num_heads": 6,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            },
        ),
    }


SCHEDULER = {"shift": 3.0}


@cache
def position_table() -> np.ndarray:
    """Sines and cosines of every patch's column and row, counted from the centre, [TABLE_SIDE^2, WIDTH]."""
    quarter = WIDTH // 4
    frequencies = 1 / 10000 ** (np.arange(quarter) / quarter)
    angles = (np.arange(TABLE_SIDE) - (TABLE_SIDE - 1) / 2)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = (grid.ravel() for grid in np.indices((TABLE_SIDE, TABLE_SIDE)))
    return np.concatenate([axis[columns], axis[rows]], axis=1).astype(np.float32)
