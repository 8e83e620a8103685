"""A small `spiece.model`, its protobuf bytes written by hand: the `sentencepiece` package is not needed."""

import json
import struct
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPECIAL = [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]

WORDS = ["a", "red", "circle", "caf\u00e9", "circ", "le", "left", "panda", "fi", "na\u00efve"]

PIECES = [
    *SPECIAL,
    ("<cat>", 0.0, USER_DEFINED),
    *((f"\u2581{word}", -2.0 - number / 8, NORMAL) for number, word in enumerate(WORDS)),
    *((word, -3.5 - number / 8, NORMAL) for number, word in enumerate(WORDS) if len(word) > 1),
    ("\u2581", -2.5, NORMAL),
    *((letter, -6.0 - number / 16, NORMAL) for number, letter in enumerate("abcdefilnoprst\u00e9\u00ef!,._")),
]

REPLACEMENTS = {
    "\t": " ",
    "\n": " ",
    "\u00a0": " ",
    "\u3000": " ",
    "\ufb01": "fi",
    "e\u0301": "\u00e9",
    "i\u0308": "\u00ef",
    "\uff21": "a",
    "\u200b": "",
    "\u200d": " ",
}


def varint(number: int) -> bytes:
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def tag(number: int, value: int | float | bytes) -> bytes:
    """A field of a message."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text: str, score: float, kind: int) -> bytes:
    return tag(1, tag(1, text.encode()) + tag(2, score) + (tag(3, kind) if kind != NORMAL else b""))


def charsmap(replacements: dict[str, str]) -> bytes:
    """SentencePiece's table: a double array (darts-clone) whose node n owns the units from 256 n, and replacements."""
    nodes: list[dict[int, int]] = [{}]  # by byte, the next node
    values: dict[int, int] = {}  # by node, where its replacement begins
    texts = b""
    for text, replacement in replacements.items():
        node = 0
        for byte in text.encode():
            if byte not in nodes[node]:
                nodes[node][byte] = len(nodes)
                nodes.append({})
            node = nodes[node][byte]
        values[node] = len(texts)
        texts += replacement.encode() + b"\0"
    units = [0] * (256 * (len(nodes) + 1))

    def fill(node: int, position: int) -> None:
        """The unit at `position` leads to the units of `node`: the offset between them is an exclusive or."""
        base = 256 * (node + 1)
        units[position] |= (position ^ base) << 10 | (node in values) << 8
        if node in values:
            units[base] = values[node] | 1 << 31
        for byte, child in nodes[node].items():
            units[base ^ byte] = byte
            fill(child, base ^ byte)

    fill(0, 0)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts


def model_bytes(
    pieces=PIECES, *, unk_id=2, model_type=1, trainer=b"", normalizer=b"", replacements=REPLACEMENTS, table=None
) -> bytes:
    """A whole file. `trainer` and `normalizer` are further fields of these messages, and `table` is a charsmap."""
    table = charsmap(replacements) if table is None else table
    spec = tag(1, b"corpus.txt") + tag(3, model_type) + tag(10, 0.9995) + tag(40, unk_id) + trainer
    rules = tag(1, b"nmt_nfkc") + (tag(2, table) if table else b"") + tag(3, 1) + normalizer
    return b"".join(piece(*fields) for fields in pieces) + tag(2, spec) + tag(3, rules)


def write_sentencepiece(folder: Path, data: bytes | None = None, **fields) -> None:
    """A tokenizer folder as those of CogVideoX, without its `added_tokens.json`; a field that is None is left out."""
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(model_bytes() if data is None else data)
    config = dict(
        tokenizer_class="T5Tokenizer",
        model_max_length=226,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_ids=100,
        additional_special_tokens=[f"<extra_id_{number}>" for number in range(100)],
        sp_model_kwargs={},
        legacy=True,
    )
    config = {name: value for name, value in (config | fields).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
