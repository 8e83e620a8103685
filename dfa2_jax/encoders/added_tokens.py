"""Tokens beside a vocabulary, as transformers 5.23 reads them (`PreTrainedTokenizerBase._from_pretrained`)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from dfa2_jax.io.errors import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

TOKEN_FIELDS = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")

Fields = dict[str, Any]
"""Fields of tokenizer_config.json, without nulls; its special tokens are strings or `AddedToken`."""


def read_fields(folder: Path) -> tuple[Fields, list[AddedToken]]:
    """A tokenizer's fields, and its added tokens in the order of their ids.

    With `added_tokens_decoder`, tokenizer_config.json says it all. Without, special_tokens_map.json comes before it,
    and added_tokens.json has the added tokens.

    Raises:
        FileNotFoundError: the folder has no tokenizer_config.json.
        CheckpointError: a file is not JSON.
        ValueError: a token has no text.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no tokenizer_config.json; point at a tokenizer of a diffusers folder")
    fields = {name: value for name, value in read_json(path).items() if value is not None}
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens")
    numbered: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in fields:
        for number, token in fields["added_tokens_decoder"].items():
            numbered[int(number)] = token_of(token)
    else:
        special = read_optional(folder / "special_tokens_map.json")
        fields |= {name: token_of(value, special=True) for name, value in special.items() if value is not None}
        extra = fields.get("extra_special_tokens") or extra
        special = {str(token) for token in [*(fields[name] for name in NAMED if name in fields), *(extra or [])]}
        extra = extra or fields.get("additional_special_tokens")
        for text, number in read_optional(folder / "added_tokens.json").items():
            numbered[number] = AddedToken(text, normalized=text not in special, special=text in special)
    extra = extra.values() if isinstance(extra, Mapping) else extra or []
    fields["extra_special_tokens"] = [token_of(token) for token in extra]
    by_text = {token.content: token for token in numbered.values()}
    for name in names_of(fields):
        token = token_of(fields[name])
        fields[name] = by_text.get(str(token), token)
        if isinstance(fields[name], AddedToken):
            fields[name].special = True
    return fields, [token for _, token in sorted(numbered.items())]


def names_of(fields: Fields) -> list[str]:
    """Fields that hold special tokens: transformers' own, then a model's."""
    more = [name for name in fields if name.endswith("_token") and name not in NAMED]
    held = (str, AddedToken, Mapping)
    return [name for name in (*NAMED, *more) if isinstance(fields.get(name), held)]


def read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def token_of(value: Any, **flags: bool) -> Any:
    """The token that a file describes by its fields; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    fields: dict[str, Any] = {name: value[name] for name in TOKEN_FIELDS if name in value}
    if not isinstance(fields.get("content"), str):
        raise ValueError(f"the token {value!r:.200} has no text as its content")
    fields |= flags
    return AddedToken(**fields)


def add_tokens(backend: Tokenizer, added: Iterable[AddedToken], fields: Fields) -> None:
    """Each once: the added tokens, then special tokens by name, then others that are special."""
    tokens: dict[str, AddedToken] = {}
    for token in [*added, *(fields[name] for name in names_of(fields)), *fields["extra_special_tokens"]]:
        tokens.setdefault(str(token), AddedToken(token, special=True) if isinstance(token, str) else token)
    backend.add_tokens(list(tokens.values()))
