"""Tokenizers that panic, hang, grow or lack their files: each is refused by name, in bounded time and memory."""

import base64
import json
import os
import time

import pytest
import tokenizers
from tokenizer_cases import write_clip_json, write_clip_old

from dfa2_jax.encoders import bounds
from dfa2_jax.encoders.tokenizers import load_tokenizer
from dfa2_jax.io.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    write_clip_json(tmp_path, "!")
    return tmp_path


def edit(folder, file="tokenizer.json", **changes):
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(content))


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def replace(text, content):
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def sequence(name, *steps):
    return {"type": "Sequence", name: steps}


def charsmap(replacement):
    data = (4).to_bytes(4, "little") + b"\0" * 4 + replacement + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": sequence("normalizers", *[replace("a", "aa")] * 40)},
        {"normalizer": sequence("normalizers", sequence("normalizers", replace("a", "a" * 20_000)))},
        {"normalizer": charsmap(b"a" * 20_000)},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 20_000}},
        {"pre_tokenizer": sequence("pretokenizers", *[{"type": "ByteLevel", "add_prefix_space": False}] * 40)},
        {"decoder": sequence("decoders", *[replace("a", "aa")] * 40)},
    ],
)
def test_steps_that_lengthen_without_bounds_are_refused(changes, folder):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"tokenizer.json: {next(iter(changes))} may lengthen a text .* times"):
        load_tokenizer(folder)


def test_a_panic_at_a_prompt_is_an_error(folder):
    edit(folder, pre_tokenizer=split("(a+)+$"))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(CheckpointError, match="could not read the prompts: PanicException"):
        tokenizer.encode(["a" * 40 + "c"])


def test_a_panic_at_reading_is_an_error(folder):
    edit(folder, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(CheckpointError, match="is not a tokenizer that can be read: PanicException"):
        load_tokenizer(folder)


def test_work_without_end_is_left_after_a_while(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(bounds, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(tokenizers.Tokenizer, "encode_batch", lambda self, prompts: time.sleep(3), raising=False)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="could not read the prompts: no answer after 0.1 seconds"):
        tokenizer.encode(["red"])
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_config.json", {"model_max_length": 0}, "model_max_length=0 is not a number of tokens"),
        ("tokenizer_config.json", {"model_max_length": "77"}, "model_max_length='77' is not"),
        ("tokenizer_config.json", {"model_max_length": True}, "model_max_length=True is not"),
        ("tokenizer_config.json", {"padding_side": "left"}, "padding_side='left' is not supported"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side='left' is not supported"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"text": "a"}}}, "has no text as its content"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "tokenizer that can be read"),
    ],
)
def test_fields_of_no_use_are_named(file, changes, message, folder):
    edit(folder, file, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("side", ["padding", "truncation"])
def test_the_side_in_tokenizer_json_counts_as_well(side, folder):
    more = {"padding": {"pad_id": 0, "pad_type_id": 0, "pad_token": "!", "pad_to_multiple_of": None}}
    more["truncation"] = {"max_length": 9, "stride": 0}
    kind = {"strategy": "LongestFirst"} if side == "truncation" else {"strategy": {"Fixed": 9}}
    edit(folder, **{side: {"direction": "Left"} | more[side] | kind})
    with pytest.raises(CheckpointError, match=f"{side}_side='left' is not supported"):
        load_tokenizer(folder)


def test_a_length_that_is_transformers_placeholder_needs_one_from_the_call(folder):
    edit(folder, "tokenizer_config.json", model_max_length=10**30)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(["red"], 5).shape == (1, 5)
    with pytest.raises(ValueError, match="model_max_length=1e[+]30 in tokenizer_config.json is no limit"):
        tokenizer.encode(["red"])


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["FIFO", "pointer", "empty"])
def test_what_is_no_file_is_named(file, kind, tmp_path):
    (write_clip_json(tmp_path, "!") if file == "tokenizer.json" else write_clip_old(tmp_path, "!"))
    path = tmp_path / file
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\n" * (kind == "pointer"))
    message = {"FIFO": "is a FIFO, not a file", "pointer": "git lfs pull", "empty": "is empty"}[kind]
    with pytest.raises(CheckpointError, match=f"{file} .*{message}|{file}.*{message}"):
        load_tokenizer(tmp_path)


def test_byte_order_marks_are_passed_over(tmp_path):
    write_clip_old(tmp_path, "!")
    want = load_tokenizer(tmp_path).encode(["a red circle"])
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert (load_tokenizer(tmp_path).encode(["a red circle"]) == want).all()


def test_merges_that_are_no_pairs_are_named(tmp_path):
    write_clip_old(tmp_path, "!")
    with (tmp_path / "merges.txt").open("a") as file:
        file.write("a b c\n")
    with pytest.raises(CheckpointError, match=r"merges.txt: line \d+ is 'a b c', not two tokens"):
        load_tokenizer(tmp_path)
