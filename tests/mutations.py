"""Damages a folder of safetensors and says how the reader took it; shared by test_fuzz.py and benchmarks/fuzz.py."""

import json
import random
import re
import tracemalloc
from pathlib import Path

import numpy as np

from convert.safetensors_mmap import open_weights
from dfa2_jax.faults import CheckpointError

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
SLACK_BYTES = 32_000
"""For what does not grow with the file: records of tensors, messages of 200 characters, tracebacks (13 kB seen)."""

NUMBERS = [b"0", b"1", b"-1", b"00", b"1e9", b"1.5", b"255", b"65536", b"4294967296", b"9999999999999999", b"9" * 400]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"null",
    b"true",
    b"NaN",
    b"[" * 3000,
    b'{"a":' * 600,
    b'"\xc3\xa9"',
]
TOKENS += [b'"__metadata__":{}', b'"dtype":"F32"', b'"\\ud800"', b"\x00", b"\xff\xfe", b"../", b"/etc/passwd", b"\n"]


def write_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Two valid folders, of one file and of an index with two shards, as bytes by file name."""
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    tensors = {f"blocks.{i}.weight": rng.standard_normal((4, 3 + i), np.float32) for i in range(4)}
    tensors |= {"half": np.ones((2, 0, 3), np.float16), "scalar": np.array(7, np.int64)}
    names = ["a.safetensors", "b.safetensors"]
    placed = {key: names[number % 2] for number, key in enumerate(tensors)}
    shards = {name: save({key: tensors[key] for key in tensors if placed[key] == name}) for name in names}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}).encode()
    samples = {"single": {SINGLE: save(tensors, {"format": "pt"})}, "sharded": {INDEX: index, **shards}}
    for name, files in samples.items():
        (folder / name).mkdir()
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
    return samples


def text_end(data: bytes, is_json: bool) -> int:
    """Where the JSON ends: most of the damage goes there, as the weights may hold anything."""
    return len(data) if is_json else 8 + int.from_bytes(data[:8], "little")


def edit_json(rng: random.Random, text: bytes) -> bytes:
    """Another number, or a piece of the structure moved, doubled or gone."""
    kind = rng.randrange(4)
    if kind == 0 and (numbers := list(re.finditer(rb"\d+", text))):
        hit = rng.choice(numbers)
        near = str(max(0, int(hit.group()) + rng.choice((-8, -4, -1, 1, 4, 8)))).encode()
        return text[: hit.start()] + rng.choice([*NUMBERS, near]) + text[hit.end() :]
    if kind == 1:
        strings = list(re.finditer(rb'"[^"]*"', text))
        hit, other = rng.choice(strings), rng.choice(strings)
        return text[: hit.start()] + other.group() + text[hit.end() :]
    pieces = list(re.finditer(rb'\{[^{}]*\}|\[[^\[\]]*\]|"[^"]*":', text))
    hit, other = rng.choice(pieces), rng.choice(pieces)
    new = b"" if kind == 2 else other.group()
    return text[: hit.start()] + new + text[hit.end() :]


def mutate(rng: random.Random, data: bytes, is_json: bool) -> bytes:
    """One to three changes; the length of the header is put right in half of the cases."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        end = text_end(data, is_json)
        end = end if 0 < end <= len(data) else len(data)
        at = rng.randrange(end if rng.random() < 0.7 else len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + rng.choice((1, 1, 8, 40)) :]
        elif kind == 3 and rng.random() < 0.2:
            data = data[:at]
        else:
            begin = 0 if is_json else 8
            text = data[begin:end]
            try:
                text = edit_json(rng, text)
            except IndexError:  # nothing left to choose from
                text = text[:-1]
            head = b"" if is_json else len(text).to_bytes(8, "little")
            data = head + text + data[end:]
        if not data:
            return data
        if not is_json and kind in (1, 2) and rng.random() < 0.5:
            length = max(0, end - 8 + (len(rng.choice(TOKENS)) if rng.random() < 0.1 else 0))
            data = length.to_bytes(8, "little") + data[8:]
    return data


def read(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor."""
    arrays = {key: tensor.array() for key, tensor in open_weights(folder).items()}
    return {key: (array.dtype.name, array.shape, array.tobytes()) for key, array in arrays.items()}


def reference(files: dict[str, bytes]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What safetensors' own reader makes of the same bytes."""
    from safetensors import deserialize

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
    found = {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            for key, tensor in deserialize(data):
                kind = tensor["dtype"]
                width = {"I": "int", "U": "uint"}
                dtype = names.get(kind) or (width[kind[0]] + kind[1:] if kind[0] in width else kind)
                found[key] = (dtype, tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


class Fuzzer:
    """Damages the samples, one file at a time, and counts what came of it."""

    def __init__(self, folder: Path, seed: int):
        self.rng, self.folder, self.samples = random.Random(seed), folder, write_samples(folder)
        self.counts = {"refused": 0, "read": 0}
        self.peak_above_twice = dict.fromkeys(self.samples, 0)
        for name, files in self.samples.items():  # imports and caches are made before memory is counted
            assert read(folder / name) == reference(files)

    def step(self) -> None:
        """One damaged file. Raises AssertionError, with the file, if it is taken in a wrong way."""
        sample = self.rng.choice(sorted(self.samples))
        name = self.rng.choice(sorted(self.samples[sample]))
        damaged = mutate(self.rng, self.samples[sample][name], name == INDEX)
        path = self.folder / sample / name
        path.unlink()  # not overwritten: maps of the old file may be open
        path.write_bytes(damaged)
        files = self.samples[sample] | {name: damaged}
        try:
            self.check(sample, files)
        except BaseException as error:
            error.add_note(f"{name} of the {sample} sample: {damaged!r:.3000}")
            raise
        finally:
            path.unlink()
            path.write_bytes(self.samples[sample][name])

    def check(self, sample: str, files: dict[str, bytes]) -> None:
        tracemalloc.start()
        try:
            found = {key: tensor.array() for key, tensor in open_weights(self.folder / sample).items()}
        except CheckpointError:
            found = None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        above = peak - 2 * sum(map(len, files.values()))
        self.peak_above_twice[sample] = max(self.peak_above_twice[sample], above)
        assert above <= SLACK_BYTES, f"{peak} bytes allocated, {above} above twice the files"
        self.counts["refused" if found is None else "read"] += 1
        if found is not None:  # what is taken must be what the reference reader takes, and equal
            got = {key: (array.dtype.name, array.shape, array.tobytes()) for key, array in found.items()}
            assert got == reference(files)
