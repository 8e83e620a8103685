"""CLIP and T5 tokenizers of a diffusers folder, on the `tokenizers` library alone: no torch, no transformers.

Ids equal those of transformers' tokenizers called as the diffusers pipelines call them (`padding="max_length"`,
`truncation=True`).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dfa2_jax.io.errors import blame

logger = logging.getLogger("dfa2_jax")

# OpenAI's pattern (openai/CLIP, simple_tokenizer.py): contractions, words, single digits, runs of punctuation.
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    backend: tokenizers.Tokenizer
    pad_id: int
    model_max_length: int  # tokens; CLIP's 77; T5's prompts may be cut shorter
    name: str  # of the folder, for the log

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, or CLIP's older `vocab.json` and `merges.txt`, beside `tokenizer_config.json`.

        Raises FileNotFoundError where neither is there, ValueError where the config lacks a needed field.
        """
        folder = Path(folder)
        config = read_config(folder)
        if (folder / "tokenizer.json").is_file():
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend = clip_backend(folder, config)
        else:
            raise FileNotFoundError(missing_files(folder))
        # A pad token is special even where it is a word: bigG pads with "!", and then no prompt's "!" is punctuation.
        pad = special_token(config, "pad_token", folder)
        pad_id = token_id(backend, pad, folder)
        backend.add_special_tokens([pad])
        backend.no_padding()
        backend.no_truncation()
        return cls(
            backend=backend,
            pad_id=pad_id,
            model_max_length=int(field(config, "model_max_length", folder)),
            name=folder.name,
        )

    def encode(self, prompts: Sequence[str], max_length: int | None = None) -> Int[np.ndarray, "B T"]:
        """Ids of each prompt, cut or padded to `max_length` (None: the model's); what is cut is logged as a warning."""
        max_length = max_length or self.model_max_length
        ids = np.full((len(prompts), max_length), self.pad_id, np.int32)
        for row, encoding in zip(ids, self.backend.encode_batch(list(prompts)), strict=True):
            given = encoding.ids
            if len(given) > max_length:
                self.warn_cut(given, max_length)
                given = given[: max_length - 1] + given[-1:]  # the end token stays
            row[: len(given)] = given
        return ids

    def warn_cut(self, ids: Sequence[int], max_length: int) -> None:
        cut = self.backend.decode(ids[max_length - 1 : -1], skip_special_tokens=False)
        suffix = getattr(self.backend.model, "end_of_word_suffix", None)
        cut = cut.replace(suffix, " ").strip() if suffix else cut
        logger.warning(
            "%s: the prompt has %d tokens and was cut to %d; the text encoder does not see %r",
            *(self.name, len(ids), max_length, cut),
        )


def read_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, over what `special_tokens_map.json` says."""
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer_config.json; point at a tokenizer of a diffusers folder")
    files = [folder / "special_tokens_map.json", folder / "tokenizer_config.json"]
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    return {key: value for part in parts for key, value in part.items() if value is not None}


def field(config: Mapping[str, Any], name: str, folder: Path) -> Any:
    if name not in config:
        raise ValueError(f"{folder / 'tokenizer_config.json'} lacks {name!r}; it has {sorted(config)}")
    return config[name]


def special_token(config: Mapping[str, Any], name: str, folder: Path) -> str:
    """A special token's text; files hold it bare or as the fields of an `AddedToken`."""
    token = field(config, name, folder)
    return token["content"] if isinstance(token, dict) else token


def token_id(backend: tokenizers.Tokenizer, token: str, folder: Path) -> int:
    """A special token's id; one that the vocabulary lacks would get an id that the encoder has no embedding for."""
    found = backend.token_to_id(token)
    if found is None:
        size = backend.get_vocab_size()
        raise ValueError(f"{folder}: special token {token!r} is not among the {size} tokens of the vocabulary")
    return found


def clip_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """CLIP's byte-level BPE from its vocabulary and merges: what transformers' `CLIPTokenizer` builds."""
    start, end, unknown = (special_token(config, name, folder) for name in ("bos_token", "eos_token", "unk_token"))
    backend = tokenizers.Tokenizer(
        models.BPE.from_file(
            str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>", unk_token=unknown
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    start_id, end_id = token_id(backend, start, folder), token_id(backend, end, folder)
    backend.add_special_tokens([start, end, unknown])
    backend.post_processor = processors.RobertaProcessing(
        (end, end_id), (start, start_id), trim_offsets=False, add_prefix_space=False
    )
    return backend


def missing_files(folder: Path) -> str:
    if (folder / "spiece.model").is_file():
        return (
            f"{folder} has spiece.model but no tokenizer.json. Write one beside it, once, where transformers and "
            f"sentencepiece are installed: transformers.T5TokenizerFast.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})"
        )
    found = sorted(path.name for path in folder.iterdir())
    return f"{folder} has neither tokenizer.json nor vocab.json with merges.txt; it has {found}"


def load_tokenizer(folder: Path) -> Tokenizer:
    """As `Tokenizer.load`.

    Raises:
        CheckpointError: what is wrong with the folder.
    """
    with blame(f"{folder} is not a tokenizer that can be read"):
        return Tokenizer.load(folder)
