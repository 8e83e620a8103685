"""T5's tokenizer from `spiece.model` alone: ids are those of transformers, and damage is an error."""

import importlib
import json
import random
import struct
import time

import pytest
import transformers
from sentencepiece_cases import (
    BYTE,
    NORMAL,
    PIECES,
    REPLACEMENTS,
    SPECIAL,
    UNUSED,
    charsmap,
    model_bytes,
    piece,
    tag,
    varint,
    write_sentencepiece,
)

from dfa2_jax.encoders import sentencepiece
from dfa2_jax.encoders.tokenizers import load_tokenizer
from dfa2_jax.io.errors import CheckpointError

PROMPTS = [
    "",
    " \t\n ",
    "a red circle",
    "  a   red\tcircle \n left  ",
    "caf\u00e9 cafe\u0301 na\u00efve nai\u0308ve, \ufb01le \uff21",
    "emoji \U0001f600\U0001f469\u200d\U0001f680 \u2764\ufe0f a",
    "\u7ea2\u8272\u7684\u5706 \u043a\u0440\u0430\u0441\u043d\u044b\u0439 red",
    "no-break\u00a0a\u3000red\u200bcircle",
    "\u2581a \u2581\u2581 a\u2581b",
    "a </s> <pad> <unk> <extra_id_0> red<extra_id_99>left",
    "panda_left. circles! zzz qqq",
    "red circle " * 200,
    "panda! " * 60 + "tail",
]


@pytest.fixture
def theirs(monkeypatch):
    """Transformers' tokenizer of a folder. Its reader asks for the sentencepiece package, but reads with protobuf."""
    monkeypatch.setattr(
        importlib.import_module("transformers.convert_slow_tokenizer"), "requires_backends", lambda *_: None
    )
    return transformers.T5Tokenizer.from_pretrained


NO_DECODER = dict(additional_special_tokens=None, extra_ids=None)
DECODER = {
    number: dict(content=token, lstrip=number > 100, rstrip=False, normalized=False, single_word=False, special=True)
    for number, token in [(0, "<pad>"), (1, "</s>"), (2, "<unk>")]
    + [(len(PIECES) + 99 - number, f"<extra_id_{number}>") for number in range(100)]
}


@pytest.mark.parametrize("max_length", [226, 20, 5])
@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (model_bytes(), {}),
        (model_bytes(), NO_DECODER),
        (model_bytes(), dict(added_tokens_decoder=DECODER)),
        (model_bytes(), dict(extra_ids=3, additional_special_tokens=None)),
        (model_bytes(replacements={}, table=b""), {}),
    ],
    ids=["cogvideox", "bare", "decoder", "three_sentinels", "no_charsmap"],
)
def test_ids_are_those_of_transformers(data, fields, max_length, theirs, tmp_path):
    write_sentencepiece(tmp_path, data, **fields)
    want = theirs(tmp_path)(PROMPTS, padding="max_length", max_length=max_length, truncation=True).input_ids
    ours = load_tokenizer(tmp_path)
    for prompt, row, expected in zip(PROMPTS, ours.encode(PROMPTS, max_length).tolist(), want, strict=True):
        assert row == expected, prompt
    assert ours.model_max_length == 226 and ours.pad_id == 0


def test_ids_of_words_sentinels_and_unknown_letters(tmp_path):
    write_sentencepiece(tmp_path)
    ids = {text: number for number, (text, *_) in enumerate(PIECES)}
    red, space = ids["\u2581red"], ids["\u2581"]
    encode = load_tokenizer(tmp_path).encode
    prompts = ["", "red  red", "\u7ea2\u8272", "red<extra_id_0><extra_id_99>", "na\u00efve nai\u0308ve"]
    naive = ids["\u2581na\u00efve"]
    assert encode(prompts, 5).tolist() == [
        [1, 0, 0, 0, 0],
        [red, red, 1, 0, 0],
        [space, 2, 1, 0, 0],
        [red, len(PIECES) + 99, len(PIECES), 1, 0],
        [naive, naive, 1, 0, 0],
    ]


def test_a_users_piece_is_found_within_words(tmp_path):
    """As in SentencePiece 0.2.3. Which of them transformers splits a text at depends on further files."""
    write_sentencepiece(tmp_path)
    ids = {text: number for number, (text, *_) in enumerate(PIECES)}
    want = [ids[text] for text in ("\u2581red", "\u2581", "<cat>", "\u2581a", "<cat>", "</s>")]
    assert load_tokenizer(tmp_path).encode(["red <cat> a<cat>"], 6).tolist() == [want]


def test_what_is_cut_is_logged(tmp_path, caplog):
    write_sentencepiece(tmp_path)
    load_tokenizer(tmp_path).encode(["a red circle na\u00efve panda"], 4)
    (record,) = caplog.records
    assert "has 6 tokens and was cut to 4" in record.getMessage() and "'na\u00efve panda'" in record.getMessage()


def test_bytes_stand_for_unknown_letters_where_the_model_has_them(tmp_path):
    """As in SentencePiece; transformers' T5 takes the unknown token."""
    pieces = [*PIECES, *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256))]
    write_sentencepiece(tmp_path, model_bytes(pieces, trainer=tag(35, 1)))
    tokenizer = load_tokenizer(tmp_path)
    space = [text for text, *_ in PIECES].index("\u2581")
    want = [space, *(len(PIECES) + byte for byte in "\u7ea2".encode()), 1]
    assert tokenizer.encode(["\u7ea2"], 5).tolist() == [want]
    assert tokenizer.backend.decode(want) == "\u7ea2"


def test_tokenizer_json_comes_first(theirs, tmp_path):
    write_sentencepiece(tmp_path)
    theirs(tmp_path).save_pretrained(tmp_path)
    want = load_tokenizer(tmp_path).encode(PROMPTS)
    (tmp_path / "spiece.model").write_bytes(b"damaged")
    assert (load_tokenizer(tmp_path).encode(PROMPTS) == want).all()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="spiece.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


RED = ("\u2581red", -1.0, NORMAL)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (model_bytes(model_type=2), r"model_type=2 \(BPE\) is not supported, only 1 \(unigram\)"),
        (model_bytes(model_type=9), r"model_type=9 \(unknown\)"),
        (model_bytes(unk_id=1), r"unk_id=1, but pieces of the unknown type are \[2\]"),
        (model_bytes(unk_id=2**64 - 1), "unk_id=18446744073709551615, but"),
        (model_bytes(trainer=tag(24, 1)), "whitespace_as_suffix=True is not supported, only T5's False"),
        (model_bytes(normalizer=tag(3, 0)), "add_dummy_prefix=False is not supported, only T5's True"),
        (model_bytes(normalizer=tag(4, 0)), "remove_extra_whitespaces=False"),
        (model_bytes(normalizer=tag(5, 0)), "escape_whitespaces=False"),
        (model_bytes([*SPECIAL, RED, RED]), "piece 4 is '\u2581red', empty or a second time"),
        (model_bytes([*SPECIAL, ("", -1.0, NORMAL)]), "piece 3 is '', empty"),
        (model_bytes([*SPECIAL, ("red", float("nan"), NORMAL)]), "piece 3, 'red': score=nan is not finite"),
        (model_bytes([*SPECIAL, ("red", -1.0, UNUSED)]), "piece 3, 'red': type=5 is none of"),
        (model_bytes([SPECIAL[0], SPECIAL[2], RED], unk_id=1), "eos_token='</s>' is not among the 3 pieces"),
        (model_bytes([]), r"unk_id=2, but pieces of the unknown type are \[\]"),
        (tag(1, tag(1, b"\xff")), "codec can't decode"),
        (tag(1, 3), "piece 0 is int, not bytes"),
        (tag(1, tag(2, b"123")), "piece 0: score has 3 bytes, not 4"),
        (tag(1, tag(3, b"123")), "piece 0: type is bytes, not int"),
        (tag(2, tag(3, b"123")), "trainer_spec: model_type is bytes, not int"),
        (b"\x0a" + b"\xff" * 9 + b"\x01abc", r"field 1 has \d{20} bytes, but 3 are left"),
        (b"\xff" * 11, "a number that does not end, at byte 0 of 11"),
        (b"\x0b", "field 1 of wire type 3"),
        (b"\x00\x00", "field 0 of wire type 0"),
        (model_bytes(table=charsmap({"a": "b" * 20_000})), "may lengthen a text 2e"),
        (model_bytes(table=struct.pack("<I", 2**32 - 1)), "charsmap of 4 bytes with a trie of 4294967295"),
        (b"", "spiece.model is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_no_t5_has_is_named(data, message, tmp_path):
    write_sentencepiece(tmp_path, data)
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "spiece.model" in str(error.value)


@pytest.mark.parametrize("extra_ids", [-1, 1001, 10**9, 2.5, True, "100"])
def test_a_wrong_number_of_sentinels_is_named(extra_ids, tmp_path):
    write_sentencepiece(tmp_path, extra_ids=extra_ids)
    with pytest.raises(CheckpointError, match=r"extra_ids=.* is not a number from 0 to 1000"):
        load_tokenizer(tmp_path)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    write_sentencepiece(tmp_path)
    size = (tmp_path / "spiece.model").stat().st_size
    for name, limit, message in (
        ("MAX_BYTES", size - 1, f"spiece.model has {size} bytes, more than the {size - 1}"),
        ("MAX_PIECE_BYTES", 99, r"spiece.model.* its pieces have \d+ bytes, more than 99"),
        ("LARGEST_SIZE", len(PIECES) - 1, f"spiece.model.* it has more than {len(PIECES) - 1} pieces"),
    ):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=message):
            patch.setattr(sentencepiece, name, limit)
            load_tokenizer(tmp_path)
    load_tokenizer(tmp_path)


def outcome(folder, data):
    """What a file gives: ids or an error that names it."""
    (folder / "spiece.model").write_bytes(data)
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
        return "refused"
    try:
        tokenizer.encode(PROMPTS[:9], 30)
    except CheckpointError as error:
        assert folder.name in str(error)
        return "failed"
    return "read"


SMALL = model_bytes([*SPECIAL, *PIECES[4:16]], replacements={"\t": " ", "\ufb01": "fi"}, trainer=tag(35, 0))


def test_a_file_that_ends_early_is_an_error_or_a_tokenizer(tmp_path):
    """Cut at each byte of the pieces, of the settings and of the charsmap's ends."""
    write_sentencepiece(tmp_path)
    table = SMALL.index(charsmap({"\t": " ", "\ufb01": "fi"}))
    trainer = tag(40, 2) + tag(35, 0)
    ends = [*range(1, table + 8), *range(len(SMALL) - 16, len(SMALL))]
    start = time.monotonic()
    outcomes = [outcome(tmp_path, SMALL[:end]) for end in ends]
    assert time.monotonic() - start < 60
    whole = [end for end, found in zip(ends, outcomes, strict=True) if found == "read"]
    # Without settings, unk_id is 0, a control piece; a file that ends behind trainer_spec has no normalizer.
    assert len(ends) > 250 and whole == [SMALL.index(trainer) + len(trainer)]
    assert outcome(tmp_path, SMALL) == "read"


def test_flipped_bytes_are_an_error_or_a_tokenizer(tmp_path):
    write_sentencepiece(tmp_path)
    rng = random.Random(0)
    start = time.monotonic()
    outcomes = []
    for number in range(400):
        data = bytearray(SMALL)
        for _ in range(rng.choice([1, 1, 4])):
            # Half of them outside of the charsmap, which is most of the file
            place = rng.randrange(len(data)) if number % 2 else rng.choice([rng.randrange(250), -rng.randrange(1, 12)])
            data[place] ^= 1 << rng.randrange(8)
        outcomes.append(outcome(tmp_path, bytes(data)))
    assert time.monotonic() - start < 60
    assert {"refused", "read"} <= set(outcomes), "the cases reach both"


def test_noise_is_an_error(tmp_path):
    write_sentencepiece(tmp_path)
    rng = random.Random(1)
    assert {outcome(tmp_path, rng.randbytes(rng.randrange(1, 300))) for _ in range(100)} == {"refused"}


def test_the_file_is_read_as_protobuf_reads_it(tmp_path):
    """Fields in another order, unknown fields, and a message in two parts, whose later fields count."""
    parts = [piece(*fields) for fields in PIECES]
    eight_bytes = varint(97 << 3 | 1) + bytes(8)
    unknown = tag(99, b"later") + tag(98, 7) + eight_bytes
    spec = tag(2, tag(3, 2) + tag(40, 9)) + tag(2, tag(40, 2) + tag(3, 1))
    rules = tag(3, tag(2, charsmap(REPLACEMENTS)) + unknown)
    write_sentencepiece(tmp_path / "plain")
    write_sentencepiece(tmp_path / "odd", rules + unknown + spec + b"".join(parts) + unknown)
    plain, odd = (load_tokenizer(tmp_path / name) for name in ("plain", "odd"))
    assert (plain.encode(PROMPTS) == odd.encode(PROMPTS)).all()
    assert json.loads(plain.backend.to_str()) == json.loads(odd.backend.to_str())
