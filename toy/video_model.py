"""Sizes and the tokenizer of the video model in the box, as its folder states them.

64 pixels and 17 frames are 5 latent frames of 16 x 16, so 320 tokens; 96 pixels are 720. So a band of 1/8 of them is a
third of a frame to each side. In the order of time it is 5 places at all times. What a head keeps depends on the order.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dfa2_jax.io.atomic import write_whole
from toy.model import t5_backend, t5_pieces
from toy.scenes import COLOURS, SHAPES
from toy.video_scenes import DIRECTIONS, SPEEDS, words

WIDTH, HEADS, LAYERS = 128, 4, 8
FRAMES, LATENT_SIDE = 17, 24
"""An odd number of latent frames, 5, decodes to as many frames as were encoded. 24 latent pixels are 96 of a video."""
T5_LENGTH = 32
"""Tokens. A caption has 18 at most."""
PAD, END = 0, 1

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
}
"""CogVideoX-2B's."""


@cache
def configs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and config.json of every network, by its name in the folder."""
    return {
        "vae": (
            "AutoencoderKLCogVideoX",
            {
                "down_block_types": ["CogVideoXDownBlock3D"] * 3,
                "up_block_types": ["CogVideoXUpBlock3D"] * 3,
                "block_out_channels": [16, 32, 32],
                "layers_per_block": 1,
                "latent_channels": 16,
                "norm_num_groups": 8,
                "temporal_compression_ratio": 4,
                "sample_height": 4 * LATENT_SIDE,
                "sample_width": 4 * LATENT_SIDE,
                "scaling_factor": 1.0,
            },
        ),
        "transformer": (
            "CogVideoXTransformer3DModel",
            {
                "num_attention_heads": HEADS,
                "attention_head_dim": WIDTH // HEADS,
                "in_channels": 16,
                "out_channels": 16,
                "time_embed_dim": 64,
                "text_embed_dim": 96,
                "num_layers": LAYERS,
                "sample_width": LATENT_SIDE,
                "sample_height": LATENT_SIDE,
                "sample_frames": FRAMES,
                "patch_size": 2,
                "temporal_compression_ratio": 4,
                "max_text_seq_length": T5_LENGTH,
                "use_rotary_positional_embeddings": True,
            },
        ),
        "text_encoder": (
            "T5EncoderModel",
            {
                "vocab_size": len(pieces()),
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


def pieces() -> list[tuple[str, float]]:
    return t5_pieces(tuple(words()))


def write_tokenizer(folder: Path, name: str) -> Path:
    """`folder/name` with what `Tokenizer.load` reads."""
    folder = folder / name
    folder.mkdir()
    write_whole(folder / "tokenizer.json", t5_backend(pieces()).to_str(pretty=True))
    write_whole(folder / "tokenizer_config.json", json.dumps({"pad_token": "<pad>", "model_max_length": T5_LENGTH}))
    return folder


def token_ids(numbers: np.ndarray) -> np.ndarray:
    """What the pipeline gives T5 for the captions of `video_scenes.number_table`, int32 [captions, T5_LENGTH].

    A word is one token, so ids are looked up without the captions, of which there are 390,000.
    """
    ids = {piece[1:]: index for index, (piece, _) in enumerate(pieces()) if piece.startswith("▁")}

    def of(table: Any, column: int) -> np.ndarray:
        return np.array([ids[word] for word in table])[numbers[:, column]]

    def always(word: str) -> np.ndarray:
        return np.full(len(numbers), ids[word])

    def thing(first: int) -> list[np.ndarray]:
        colour, shape = of(COLOURS, first), of(SHAPES, first + 1)
        return [always("a"), colour, shape, always("moves"), of(SPEEDS, first + 3), of(DIRECTIONS, first + 2)]

    where = [always("on"), always("a"), of(COLOURS, 0), always("background"), np.full(len(numbers), END)]
    single, pair = [*thing(1), *where], [*thing(1), always("and"), *thing(5), *where]
    one, two = (
        np.pad(np.stack(columns, 1), ((0, 0), (0, T5_LENGTH - len(columns))), constant_values=PAD)
        for columns in (single, pair)
    )
    return np.where(numbers[:, 9:] == 2, two, one).astype(np.int32)


def config(name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A network's config.json; the autoencoder's says how its latents are spread."""
    fields = dict(configs()[name][1])
    if name == "vae":
        fields |= {"scaling_factor": round(1 / float(arrays["latents"][1]), 4)}
    return fields
