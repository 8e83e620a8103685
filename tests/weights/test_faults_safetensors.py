"""Damaged safetensors files, shards and their indexes: each is told what is wrong with which file."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from damage import KEY, WEIGHTS, copy_model, load, refuses
from safetensors.numpy import load_file, save_file

from dfa2_jax.weights.safetensors import open_safetensors


@pytest.fixture
def folder(tiny_flux_schnell, tmp_path):
    return copy_model(tiny_flux_schnell, tmp_path / "model")


def rewrite_header(path, edit, header_bytes=None):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    text = edit(header)
    text = text if isinstance(text, bytes) else json.dumps(header if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data[8 + size :])


def shift(header, by):
    begin, end = header[KEY]["data_offsets"]
    header[KEY]["data_offsets"] = [begin + by, end + by]


ENTRY = b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'

PAST_THE_END = "overlap: data_offsets|data_offsets give|tensors take"

METADATA = b'{"__metadata__":{"a":"%s"}}'

HEADERS = {
    "header longer than the file": ({"header_bytes": 2**40}, lambda h: None, "header claims 1099511627776 bytes"),
    "header over the limit": ({"header_bytes": 10**9}, lambda h: None, "header claims 1000000000 bytes"),
    "not JSON": ({}, lambda h: b"{not json", "expected"),
    "not an object": ({}, lambda h: b"[1]", r"starts with b'\['"),
    "deep nesting": ({}, lambda h: b'{"a":' + b"[" * 100_000, "expected"),
    "overlap": ({}, lambda h: shift(h, -4), "overlap: data_offsets start"),
    "gap": ({}, lambda h: shift(h, 4), "(gap|overlap): data_offsets start"),
    "past the end": ({}, lambda h: h[KEY].update(data_offsets=[0, 10**12]), PAST_THE_END),
    "negative": ({}, lambda h: h[KEY].update(data_offsets=[-4, 0]), "expected an integer"),
    "unknown dtype": ({}, lambda h: h[KEY].update(dtype="F7"), "unknown dtype 'F7'"),
    "huge shape": ({}, lambda h: h[KEY].update(shape=[2**40, 2**20]), "needs"),
    "duplicate": ({}, lambda h: b"{%s,%s}" % (ENTRY, ENTRY), "duplicate key 'a'"),
    "key outside of ASCII": ({}, lambda h: '{"é":{}}'.encode(), "expected a name in plain ASCII"),
    "long key": ({}, lambda h: b'{"%s":{}}' % (b"a" * 1001), "of at most 1000 characters"),
    "lone surrogate": ({}, lambda h: METADATA % rb"\ud800", "expected a string"),
    "no UTF-8": ({}, lambda h: METADATA % b"\xed\xa0\x80", "expected a string"),
    "too many": ({}, lambda h: b"{%s}" % b",".join(b'"%d%s' % (n, ENTRY[2:]) for n in range(10_001)), "more than 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_corrupt_headers(case, folder):
    options, edit, message = HEADERS[case]
    rewrite_header(folder / WEIGHTS, edit, **options)
    with refuses(folder, message) as caught:
        load(folder)
    assert str(folder / WEIGHTS) in str(caught.value) and "save it again" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files(keep, folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with refuses(folder, "is empty|smallest safetensors|header claims|tensors take"):
        load(folder)


def test_trailing_bytes(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"more")
    with refuses(folder, "has bytes that no tensor owns"):
        load(folder)


def test_the_reader_reads_what_safetensors_writes(tmp_path):
    tensors = {"a": np.arange(6.0).reshape(2, 3), "b": np.float16([1, 2]), "empty": np.zeros((0, 3), np.float32)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = open_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(read[key].array(), value)


def test_metadata_is_checked_without_a_copy(tmp_path):
    note = 'é €\U0001f600 "\\' * 100_000
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "x.safetensors", metadata={"note": note})
    escaped = json.dumps({"__metadata__": {"note": note}}).encode()
    (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", len(escaped)) + escaped)
    tracemalloc.start()
    try:
        assert list(open_safetensors(tmp_path / "x.safetensors")) == ["a"]
        assert not open_safetensors(tmp_path / "y.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def shard(folder, weight_map=None):
    """Two shards and their index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys, names = sorted(tensors), ("a.safetensors", "b.safetensors")
    parts = {names[0]: keys[::2], names[1]: keys[1::2]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / "transformer" / name)
    full = {key: name for name, part in parts.items() for key in part} | (weight_map or {})
    index = {
        "metadata": {"total_size": 1.5e-3, "note": "é"},
        "weight_map": {key: name for key, name in full.items() if name is not None},
    }
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_load(folder):
    whole = load(folder)
    shard(folder)
    np.testing.assert_array_equal(load(folder).proj_out.weight.kernel[...], whole.proj_out.weight.kernel[...])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({KEY: "../../outside.safetensors"}, "only plain names of safetensors files in the same"),
        ({KEY: "/etc/passwd"}, "only plain names"),
        ({KEY: 3}, "is not a sound index: expected a name"),
        ({KEY: "absent.safetensors"}, "names absent.safetensors, which is missing"),
        ({"more.weight": "a.safetensors"}, "names 1 keys that no shard holds, first 'more.weight'"),
        ({KEY: None}, f"holds key '{KEY}'"),
    ],
)
def test_bad_indexes(weight_map, message, folder):
    shard(folder, weight_map)
    with refuses(folder, message):
        load(folder)


def test_missing_shard_and_key_in_two_shards(folder):
    shard(folder)
    extra = load_file(folder / "transformer" / "a.safetensors")
    other = load_file(folder / "transformer" / "b.safetensors")
    save_file(other | dict(list(extra.items())[:1]), folder / "transformer" / "b.safetensors")
    with refuses(folder, "is in two shards"):
        load(folder)
    (folder / "transformer" / "b.safetensors").unlink()
    with refuses(folder, "names b.safetensors, which is missing"):
        load(folder)
