"""CLIP, T5 and Llama tokenizers of a diffusers folder, on the `tokenizers` library alone: no torch, no transformers.

Ids equal those of transformers' tokenizers called as the diffusers pipelines call them (`padding="max_length"`,
`truncation=True`).
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from dfa2_jax.encoders.added_tokens import Fields, add_tokens, read_fields
from dfa2_jax.encoders.bounds import check_growth, within_time
from dfa2_jax.encoders.sentencepiece import FILE as SENTENCEPIECE
from dfa2_jax.encoders.sentencepiece import MAX_EXTRA_IDS, read_model, sentencepiece_backend, sentinels
from dfa2_jax.io.errors import blame, check_file, read_json

logger = logging.getLogger("dfa2_jax")

SHOWN = 200
"""Characters of what was cut that a warning shows."""

MAX_BYTES = 50_000_000  # Gemma's tokenizer.json has 33 MB

NO_LIMIT = 10**6
"""Tokens: a larger `model_max_length` is transformers' placeholder."""

# OpenAI's pattern (openai/CLIP, simple_tokenizer.py): contractions, words, single digits, runs of punctuation.
CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    backend: tokenizers.Tokenizer
    pad_id: int
    model_max_length: int  # tokens; CLIP's 77; T5's prompts may be cut shorter
    name: str  # of the folder, for the log

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, T5's `spiece.model`, or CLIP's `vocab.json` and `merges.txt`: the first that is there.

        `tokenizer_config.json` lies beside it.

        Raises:
            FileNotFoundError: none is there.
            ValueError: a file lacks or garbles a field, or lengthens texts without bounds.
            TimeoutError: reading took more than `bounds.MAX_SECONDS`.
        """
        folder = Path(folder)
        fields, added = read_fields(folder)
        limit = length_limit(fields)
        backend = within_time(lambda: read_backend(folder, fields, added))
        check_sides(backend, fields)
        backend.no_padding()
        backend.no_truncation()
        pad_id = token_id(backend, special_token(fields, "pad_token"), folder)
        return cls(backend=backend, pad_id=pad_id, model_max_length=limit, name=folder.name)

    def encode(self, prompts: Sequence[str], max_length: int | None = None) -> Int[np.ndarray, "B T"]:
        """Ids of each prompt, cut or padded to `max_length` (None: the model's); what is cut is logged as a warning.

        Raises:
            ValueError: neither the call nor the model gives a length, or the tokenizer fails or does not end.
        """
        return self.encode_counted(prompts, max_length)[0]

    def encode_counted(
        self, prompts: Sequence[str], max_length: int | None = None
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
        """Ids as of `encode`, and how many of each prompt's are no padding.

        An end token stays where a prompt is cut if the tokenizer itself puts it there (CLIP, T5). Llama's tokenizer
        puts none, and an end that a prompt's text brings is cut off with the text.

        Raises:
            ValueError: as `encode`.
        """
        max_length = max_length or self.model_max_length
        if max_length > NO_LIMIT:
            raise ValueError(f"{self.name}: model_max_length={max_length:.3g} in tokenizer_config.json is no limit")
        with blame(f"{self.name} could not read the prompts"):
            encodings = within_time(lambda: self.backend.encode_batch(list(prompts)))
        ids = np.full((len(prompts), max_length), self.pad_id, np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for number, encoding in enumerate(encodings):
            given = encoding.ids
            if len(given) > max_length:
                kept = encoding.special_tokens_mask[-1]  # 1 for what the tokenizer puts there, 0 for text
                self.warn_cut(given, slice(max_length - kept, len(given) - kept), max_length)
                given = given[: max_length - kept] + given[len(given) - kept :]
            ids[number, : len(given)], lengths[number] = given, len(given)
        return ids, lengths

    def warn_cut(self, ids: Sequence[int], removed: slice, max_length: int) -> None:
        cut = self.backend.decode(ids[removed], skip_special_tokens=False)
        suffix = getattr(self.backend.model, "end_of_word_suffix", None)
        cut = cut.replace(suffix, " ").strip() if suffix else cut
        cut = cut if len(cut) <= SHOWN else f"{cut[:SHOWN]}..."
        logger.warning(
            "%s: the text has %d tokens and was cut to %d; the text encoder does not see %r",
            *(self.name, len(ids), max_length, cut),
        )


def read_backend(folder: Path, fields: Fields, added: Sequence[AddedToken]) -> tokenizers.Tokenizer:
    """The tokenizer of the folder's files, with the tokens that lie beside its vocabulary."""
    names = ("tokenizer.json", SENTENCEPIECE, "vocab.json", "merges.txt")
    whole, pieces, vocabulary, merges = (folder / name for name in names)
    needed = ["pad_token"]
    extra: list[str] = []
    if whole.exists():
        backend = whole_backend(whole)
    elif pieces.exists():
        extra = sentinels(extra_ids(fields))
        backend = sentencepiece_backend(read_model(pieces), special_token(fields, "eos_token"), extra)
    elif vocabulary.exists() and merges.exists():
        unknown = special_token(fields, "unk_token")
        backend = clip_backend(read_json(vocabulary, MAX_BYTES), read_merges(merges), unknown)
        needed += ["bos_token", "eos_token", "unk_token"]
    else:
        raise FileNotFoundError(missing_files(folder))
    backend.add_tokens(list(added))
    special = {name: special_token(fields, name) for name in needed}
    ids = {name: token_id(backend, token, folder) for name, token in special.items()}
    # A pad token is special even where it is a word: bigG pads with "!", and then no prompt's "!" is punctuation.
    add_tokens(backend, added, fields)
    backend.add_special_tokens(extra)  # those that the files do not describe
    if "bos_token" in special:
        start, end = ((special[name], ids[name]) for name in ("bos_token", "eos_token"))
        backend.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return backend


def whole_backend(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json, whose steps are bounded."""
    content = read_json(path, MAX_BYTES)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        check_growth(content.get(part), f"{path}: {part}")
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def check_sides(backend: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    """Prompts are cut and padded on the right, as those of all known models."""
    for field, said in (("padding_side", backend.padding), ("truncation_side", backend.truncation)):
        side = fields.get(field) or (said or {}).get("direction", "right")
        if side != "right":
            raise ValueError(f"{field}={side!r:.100} is not supported, only 'right'")


def field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"tokenizer_config.json lacks {name!r}; it has {sorted(fields)}")
    return fields[name]


def special_token(fields: Mapping[str, Any], name: str) -> str:
    value = field(fields, name)
    if not isinstance(value, str | AddedToken):
        raise ValueError(f"tokenizer_config.json: {name}={value!r:.100} is not a token")
    return str(value)


def length_limit(fields: Mapping[str, Any]) -> int:
    """Where nobody gave it, transformers writes 1e30."""
    value = field(fields, "model_max_length")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf or value % 1:
        raise ValueError(f"tokenizer_config.json: model_max_length={value!r:.100} is not a number of tokens")
    return int(value)


def token_id(backend: tokenizers.Tokenizer, token: str, folder: Path) -> int:
    """A special token's id; one that the vocabulary lacks would get an id that the encoder has no embedding for."""
    number = backend.token_to_id(token)
    if number is None:
        size = backend.get_vocab_size()
        raise ValueError(f"{folder}: special token {token!r} is not among the {size} tokens of the vocabulary")
    return number


def clip_backend(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> tokenizers.Tokenizer:
    """CLIP's byte-level BPE from its vocabulary and merges: what transformers' `CLIPTokenizer` builds."""
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=unknown,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of tokens in the order of their merges.

    Raises:
        ValueError: a line is no pair.
    """
    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {MAX_BYTES}")
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{path}: line {number} is {line!r:.100}, not two tokens with a space between them")
        merges.append((pair[0], pair[1]))
    return merges


def extra_ids(fields: Mapping[str, Any]) -> int:
    """T5's sentinels; transformers takes 100 where nobody says how many."""
    value = fields.get("extra_ids", 100)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_EXTRA_IDS:
        raise ValueError(f"tokenizer_config.json: extra_ids={value!r:.100} is not a number from 0 to {MAX_EXTRA_IDS}")
    return value


def missing_files(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return f"{folder} has neither tokenizer.json nor {SENTENCEPIECE} nor vocab.json with merges.txt; it has {names}"


def load_tokenizer(folder: Path) -> Tokenizer:
    """As `Tokenizer.load`.

    Raises:
        CheckpointError: what is wrong with the folder.
    """
    with blame(f"{folder} is not a tokenizer that can be read"):
        return Tokenizer.load(folder)
