"""T5's tokenizer from SentencePiece's own file, `spiece.model`, where a folder has no `tokenizer.json`.

The file is a protobuf message, `ModelProto` of google/sentencepiece (src/sentencepiece_model.proto). A reader of the
wire format stands here, so that no protobuf package is needed.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dfa2_jax.encoders.bounds import check_charsmap
from dfa2_jax.io.errors import LARGEST_SIZE, CheckpointError, check_file

FILE = "spiece.model"

MAX_BYTES = 8_000_000  # T5's has 0.8 MB, umT5's 4.5 MB

MAX_PIECE_BYTES = 4_000_000
"""The texts of all pieces. The library's trie takes up to 340 bytes of memory for each of their bytes."""

MAX_EXTRA_IDS = 1000
"""T5 has 100 sentinels, umT5 300."""

SPACE = "\u2581"
"""SentencePiece writes a space so."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf's encoding."""

MAX_VARINT_BYTES = 10  # of 64 bits

UNIGRAM = 1
MODEL_TYPES = {UNIGRAM: "unigram", 2: "BPE", 3: "word", 4: "char"}

NORMAL, UNKNOWN = 1, 2
TYPES = {NORMAL: "normal", UNKNOWN: "unknown", 3: "control", 4: "user defined", 6: "byte"}
"""Pieces have these types. The proto's 5, unused pieces, is refused: the library would match them in texts."""

WHITESPACE = dict(
    whitespace_as_suffix=False, add_dummy_prefix=True, remove_extra_whitespaces=True, escape_whitespaces=True
)
"""T5's settings. The library's steps for spaces do what these say."""

Value = int | bytes

Kind = TypeVar("Kind", int, bytes)


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int = NORMAL


@dataclass(kw_only=True)
class Model:
    """What T5 needs of a `ModelProto`. Defaults are the proto's."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = UNIGRAM
    whitespace_as_suffix: bool = False
    byte_fallback: bool = False
    unk_id: int = 0
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


TRAINER_FIELDS = {3: "model_type", 24: "whitespace_as_suffix", 35: "byte_fallback", 40: "unk_id"}
NORMALIZER_FIELDS = {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}


def read_model(path: Path) -> Model:
    """The pieces and settings of a `spiece.model`.

    Raises:
        CheckpointError: names the file, and the field that is damaged or too large.
    """
    check_file(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, more than the {MAX_BYTES} that such a file may have.")
        return parse_model(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except CheckpointError:
        raise
    except ValueError as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} is not a SentencePiece model: {error!s:.300}. Get the file again.") from error


def parse_model(data: bytes) -> Model:
    """
    Raises:
        ValueError: names the field that is damaged.
    """
    model = Model()
    for number, value in read_fields(data, "the model"):
        if number == 1:
            if len(model.pieces) == LARGEST_SIZE:
                raise ValueError(f"it has more than {LARGEST_SIZE} pieces")
            model.pieces.append(parse_piece(value, f"piece {len(model.pieces)}"))
        elif number == 2:
            assign(model, value, TRAINER_FIELDS, "trainer_spec")
        elif number == 3:
            assign(model, value, NORMALIZER_FIELDS, "normalizer_spec")
    check_model(model)
    return model


def parse_piece(data: Value, name: str) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in read_fields(of_kind(data, bytes, name), name):
        if number == 1:
            text = of_kind(value, bytes, f"{name}: piece")
        elif number == 2:
            bits = of_kind(value, bytes, f"{name}: score")
            if len(bits) != 4:
                raise ValueError(f"{name}: score has {len(bits)} bytes, not 4")
            (score,) = struct.unpack("<f", bits)
        elif number == 3:
            kind = of_kind(value, int, f"{name}: type")
    return Piece(text.decode(), score, kind)


def assign(model: Model, data: Value, fields: dict[int, str], name: str) -> None:
    """Set the model's fields that a message within it holds; the last of several counts."""
    for number, value in read_fields(of_kind(data, bytes, name), name):
        if number in fields:
            default, label = getattr(model, fields[number]), f"{name}: {fields[number]}"
            kept = of_kind(value, bytes, label) if isinstance(default, bytes) else of_kind(value, int, label)
            setattr(model, fields[number], bool(kept) if isinstance(default, bool) else kept)


def of_kind(value: Value, kind: type[Kind], name: str) -> Kind:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value


def read_fields(data: bytes, name: str) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message, in order. Fields of fixed length are bytes.

    Raises:
        ValueError: the message ends early, or has what protobuf has not.
    """
    position = 0
    while position < len(data):
        key, position = read_varint(data, position, name)
        number, wire = key >> 3, key & 7
        if number == 0 or wire not in (VARINT, FIXED64, BYTES, FIXED32):
            raise ValueError(f"{name} has field {number} of wire type {wire} before byte {position}")
        if wire == VARINT:
            value, position = read_varint(data, position, name)
            yield number, value
            continue
        length = {FIXED32: 4, FIXED64: 8}.get(wire)
        if length is None:
            length, position = read_varint(data, position, name)
        if length > len(data) - position:
            raise ValueError(f"{name}: field {number} has {length} bytes, but {len(data) - position} are left")
        yield number, data[position : position + length]
        position += length


def read_varint(data: bytes, position: int, name: str) -> tuple[int, int]:
    """A number in groups of 7 bits, the lowest first, and the position behind it."""
    number = 0
    for index, byte in enumerate(data[position : position + MAX_VARINT_BYTES]):
        number |= (byte & 127) << 7 * index
        if byte < 128:
            return number, position + index + 1
    raise ValueError(f"{name} has a number that does not end, at byte {position} of {len(data)}")


def check_model(model: Model) -> None:
    """T5's kind of model alone, with pieces that a tokenizer can be made of.

    Raises:
        ValueError: names the field, its value and what is supported.
    """
    if model.model_type != UNIGRAM:
        kind = MODEL_TYPES.get(model.model_type, "unknown")
        raise ValueError(f"trainer_spec: model_type={model.model_type} ({kind}) is not supported, only 1 (unigram)")
    for name, wanted in WHITESPACE.items():
        if getattr(model, name) is not wanted:
            raise ValueError(f"{name}={not wanted} is not supported, only T5's {wanted}")
    seen: set[str] = set()
    for number, piece in enumerate(model.pieces):
        if not piece.text or piece.text in seen:
            raise ValueError(f"piece {number} is {piece.text!r:.100}, empty or a second time")
        if not math.isfinite(piece.score):
            raise ValueError(f"piece {number}, {piece.text!r:.100}: score={piece.score} is not finite")
        if piece.type not in TYPES:
            raise ValueError(f"piece {number}, {piece.text!r:.100}: type={piece.type} is none of {list(TYPES)}")
        seen.add(piece.text)
    nbytes = sum(len(text.encode()) for text in seen)
    if nbytes > MAX_PIECE_BYTES:
        raise ValueError(f"its pieces have {nbytes} bytes, more than {MAX_PIECE_BYTES}")
    unknown = [number for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN]
    if unknown != [model.unk_id]:
        raise ValueError(f"trainer_spec: unk_id={model.unk_id}, but pieces of the unknown type are {unknown[:9]}")
    check_charsmap(model.charsmap, "normalizer_spec: precompiled_charsmap")


def sentencepiece_backend(model: Model, eos_token: str, extra: Sequence[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a model, with further tokens, T5's `sentinels`, behind its pieces.

    The steps are those of transformers 5.23's `T5Tokenizer`; bytes of unknown letters have pieces as in SentencePiece.
    Sentinels and the special tokens of the folder's other files are still to be added: prompts are split at them.

    Raises:
        ValueError: the model has no end token.
    """
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    if eos_token not in ids:
        raise ValueError(f"eos_token={eos_token!r:.100} is not among the {len(ids)} pieces of {FILE}")
    vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    vocabulary += [(token, 0.0) for token in extra if token not in ids]
    unigram = models.Unigram(vocabulary, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
    backend = tokenizers.Tokenizer(unigram)
    if model.charsmap:
        backend.normalizer = normalizers.Precompiled(model.charsmap)
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    spaces = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), spaces]) if model.byte_fallback else spaces
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", eos_token], special_tokens=[(eos_token, ids[eos_token])]
    )
    return backend


def sentinels(extra_ids: int) -> list[str]:
    """T5's tokens for gaps in a text, in the order of their ids: the last one comes first."""
    return [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
