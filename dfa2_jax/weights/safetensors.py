"""Safetensors files as zero-copy NumPy views of a memory map, every byte of the header checked first.

Headers and indexes are scanned as bytes, with no general JSON parser: nesting, number size and memory are bounded by
the grammar. Nothing is allocated from what a file merely claims: what is kept is a record of 500 bytes for each tensor.

Rules follow the reference implementation: a header of at most 100 MB, and tensors that cover the buffer in order,
without gaps or overlaps. Unknown fields, and names outside of ASCII or with escapes, are refused here.
"""

import codecs
import logging
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from dfa2_jax.io.errors import MAX_JSON_BYTES, CheckpointError, check_file

logger = logging.getLogger("dfa2_jax")

MAX_HEADER_BYTES = 100_000_000  # as the reference implementation
MAX_TENSORS = 10_000  # FLUX.1 has 1,160
MAX_RANK = 8

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "U64": np.uint64,
        "I32": np.int32,
        "U32": np.uint32,
        "I16": np.int16,
        "U16": np.uint16,
        "I8": np.int8,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}

Library = Literal["diffusers", "transformers"]

WEIGHT_FILES: dict[Library, tuple[str, str]] = {
    "diffusers": ("diffusion_pytorch_model", ".json"),
    "transformers": ("model", ".safetensors"),
}
"""How a library's weight files begin, and how the name ends that it takes where a single file and an index lie there.

diffusers 0.42 (`modeling_utils.from_pretrained`) looks for an index first, transformers 5.23
(`modeling_utils._get_resolved_checkpoint_files`) for a single file.
"""

SPACE = re.compile(rb"[ \t\r\n]*+")
NAME = re.compile(rb'"([ !#-\[\]-~]{0,1000}+)"')
UNICODE = (  # well-formed UTF-8 beyond ASCII (RFC 3629, section 4)
    rb"[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|\xed[\x80-\x9f][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2}"
)
ESCAPE = (  # surrogates in pairs only
    rb'\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
TEXT = re.compile(rb'"(?:[ !#-\[\]-\x7f]++|' + UNICODE + rb"|" + ESCAPE + rb')*+"')
SCALAR = re.compile(rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+|true|false|null|" + TEXT.pattern)
INTEGER = re.compile(rb"(?:0|[1-9][0-9]{0,15}+)(?![0-9.eE])")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: where it lies and how to read it."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    buffer: mmap.mmap

    @property
    def source(self) -> str:
        return f"{self.file}: {self.key}"

    def raw(self) -> np.ndarray:
        """The tensor's bytes, as a view."""
        return np.frombuffer(self.buffer, np.uint8, count=self.end - self.begin, offset=self.begin)

    def array(self) -> np.ndarray:
        """The tensor, as a read-only view."""
        return self.raw().view(DTYPES[self.dtype]).reshape(self.shape)


class Scanner:
    """Reads a safetensors header off a memory map. Raises ValueError with the place of a fault."""

    def __init__(self, data: mmap.mmap, begin: int, end: int):
        self.data, self.at, self.end = data, begin, end

    def fail(self, wanted: str) -> ValueError:
        there = bytes(self.data[self.at : min(self.at + 20, self.end)])
        return ValueError(f"expected {wanted} at byte {self.at}, found {there!r}")

    def match(self, pattern: re.Pattern[bytes], wanted: str) -> re.Match[bytes]:
        match = pattern.match(self.data, self.at, self.end)
        if match is None:
            raise self.fail(wanted)
        self.at = match.end()
        return match

    def skip(self) -> None:
        self.match(SPACE, "space, or nothing")

    def peek(self, token: bytes) -> bool:
        self.skip()
        return self.at < self.end and self.data[self.at : self.at + 1] == token

    def take(self, token: bytes) -> None:
        if not self.peek(token):
            raise self.fail(repr(token.decode()))
        self.at += 1

    def name(self) -> str:
        self.skip()
        return self.match(NAME, "a name in plain ASCII of at most 1000 characters").group(1).decode()

    def integer(self) -> int:
        self.skip()
        return int(self.match(INTEGER, "an integer from 0 to 10**16 - 1").group())

    def integers(self, max_count: int) -> tuple[int, ...]:
        values: list[int] = []
        self.take(b"[")
        while not self.peek(b"]"):
            if values:
                self.take(b",")
            if len(values) == max_count:
                raise self.fail(f"at most {max_count} numbers")
            values.append(self.integer())
        self.take(b"]")
        return tuple(values)

    def members(self):
        """Yield the names of an object's members; the caller reads each value."""
        self.take(b"{")
        first = True
        while not self.peek(b"}"):
            if not first:
                self.take(b",")
            first = False
            name = self.name()
            self.take(b":")
            yield name
        self.take(b"}")

    def metadata(self) -> None:
        """Free text of whoever wrote the file: strings only, and unused."""
        for _ in self.members():
            self.skip()
            self.match(TEXT, "a string")

    def tensor(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """(dtype, shape, offsets) of one entry."""
        fields: dict[str, str | tuple[int, ...]] = {}
        for field in self.members():
            if field in fields:
                raise ValueError(f"duplicate field {field!r:.100}")
            if field == "dtype":
                fields[field] = self.name()
            elif field == "shape":
                fields[field] = self.integers(MAX_RANK)
            elif field == "data_offsets":
                fields[field] = self.integers(2)
            else:
                raise ValueError(f"unknown field {field!r:.100}")
        if len(fields) != 3 or len(fields["data_offsets"]) != 2:
            raise ValueError(f"an entry needs dtype, shape and two data_offsets, got {fields!r:.200}")
        return fields["dtype"], fields["shape"], fields["data_offsets"]  # pyright: ignore[reportReturnType]

    def finish(self) -> None:
        self.skip()
        if self.at != self.end:
            raise self.fail("the end")


def scan_header(data: mmap.mmap, begin: int, end: int) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Entries of the header in bytes `begin` to `end`, by key."""
    scanner, entries, seen_metadata = Scanner(data, begin, end), {}, False
    for key in scanner.members():
        if key == "__metadata__":
            if seen_metadata:
                raise ValueError("duplicate key '__metadata__'")
            seen_metadata = True
            scanner.metadata()
            continue
        if key in entries:
            raise ValueError(f"duplicate key {key!r:.200}")
        if len(entries) == MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} tensors")
        try:
            entries[key] = scanner.tensor()
        except ValueError as error:
            raise ValueError(f"key {key!r:.200}: {error}") from error
    scanner.finish()
    return entries


def check_layout(entries: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]], buffer_bytes: int) -> None:
    """Known dtypes, sizes that fit shapes, and a buffer covered in order without gaps, overlaps or rest."""
    reached = 0
    for key, (dtype, shape, (begin, end)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if dtype not in DTYPES:
            raise ValueError(f"key {key!r:.200}: unknown dtype {dtype!r:.100}; known are {sorted(DTYPES)}")
        if begin != reached:
            kind = "overlap" if begin < reached else "gap"
            raise ValueError(
                f"key {key!r:.200}: {kind}: data_offsets start at {begin}, the tensor before ends at {reached}"
            )
        if end < begin:
            raise ValueError(f"key {key!r:.200}: data_offsets end at {end}, before their start {begin}")
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != needed:
            raise ValueError(
                f"key {key!r:.200}: {dtype} {list(shape)} needs {needed} bytes, data_offsets give {end - begin}"
            )
        reached = end
    if reached != buffer_bytes:
        problem = "is truncated" if reached > buffer_bytes else "has bytes that no tensor owns"
        raise ValueError(
            f"the file {problem}: its tensors take {reached} bytes, it has {buffer_bytes} after the header"
        )


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one file, by key. Reads the header only.

    Raises:
        CheckpointError: the file is missing or breaks any rule of the format.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 10:
                raise ValueError(f"it has {size} bytes; the smallest safetensors file has 10")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header_bytes = int.from_bytes(data[:8], "little")
        if header_bytes > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"its header claims {header_bytes} bytes; the file has {size}, and {MAX_HEADER_BYTES} is the most"
            )
        if data[8:9] != b"{":
            raise ValueError(f"its header starts with {data[8:9]!r}, not with '{{'")
        begin = 8 + header_bytes
        entries = scan_header(data, 8, begin)
        check_layout(entries, size - begin)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a sound safetensors file: {error}. Download or save it again.") from error
    return {
        key: Tensor(path, key, dtype, shape, begin + first, begin + last, data)
        for key, (dtype, shape, (first, last)) in entries.items()
    }


def variant_of(name: str, stem: str) -> str | None:
    """The variant in a weight file's name: '' of the full one, 'fp16' of `stem.fp16.safetensors`; None: not weights."""
    stem, variant = re.escape(stem), r"(?:\.([a-z0-9_]+))?"
    pattern = rf"{stem}{variant}\.safetensors|{stem}\.safetensors\.index{variant}\.json"
    match = re.fullmatch(pattern, name)
    return None if match is None else (match.group(1) or match.group(2) or "")


def find_weights(folder: Path, library: Library) -> Path:
    """The weight file or index that the library reads: the full one, else the '.fp16' variant, else any variant.

    Raises:
        CheckpointError: the folder has none.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror or error}.") from error
    stem, preferred = WEIGHT_FILES[library]
    weights = [(variant, name) for name in names if (variant := variant_of(name, stem)) is not None]
    if not weights:
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        hint = f" It has {pickled}: pickle is never read; save with safe_serialization=True." if pickled else ""
        raise CheckpointError(f"{folder} has no safetensors weights ({stem}.safetensors or its index).{hint}")
    weights.sort(key=lambda item: (item[0] != "", item[0] != "fp16", item[0], not item[1].endswith(preferred)))
    (variant, chosen), others = weights[0], weights[1:]
    if rest := [name for other, name in others if other == variant]:
        logger.warning("%s has %s and %s: %s reads %s, and so it is read", folder, chosen, rest[0], library, chosen)
    return folder / chosen


def scan_index(data: mmap.mmap) -> dict[str, str]:
    """`weight_map` of an index: the shard of every key. All else is passed over."""
    marked = data[:3] == codecs.BOM_UTF8  # as editors leave it
    scanner, shards, shared = Scanner(data, 3 * marked, len(data)), {}, {}
    for field in scanner.members():
        if field != "weight_map":
            for _ in scanner.members() if scanner.peek(b"{") else [None]:
                scanner.skip()
                scanner.match(SCALAR, "a number or a string")
            continue
        for key in scanner.members():
            if key in shards:
                raise ValueError(f"duplicate key {key!r:.200}")
            if len(shards) == MAX_TENSORS:
                raise ValueError(f"more than {MAX_TENSORS} tensors")
            name = scanner.name()
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
                raise ValueError(
                    f"key {key!r:.200} is placed in {name!r:.200}: only plain names of safetensors files in the same "
                    "folder are followed"
                )
            shards[key] = shared.setdefault(name, name)
    scanner.finish()
    if not shards:
        raise ValueError("it has no 'weight_map', or an empty one")
    return shards


def open_index(index: Path) -> dict[str, Tensor]:
    """Every tensor of a sharded component; index and shards must name the same keys."""
    check_file(index)
    try:
        with index.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if len(data) > MAX_JSON_BYTES:
                raise ValueError(f"it has {len(data)} bytes, more than {MAX_JSON_BYTES}")
            weight_map = scan_index(data)
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{index} is not a sound index: {error}. Download or save it again.") from error
    tensors: dict[str, Tensor] = {}
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing: download it, or save the model again.")
    for name in names:
        for key, tensor in open_safetensors(index.parent / name).items():
            if key in tensors:
                raise CheckpointError(f"Key {key!r:.200} is in two shards: {tensors[key].file} and {tensor.file}.")
            if weight_map.get(key) != name:
                raise CheckpointError(
                    f"{tensor.file} holds key {key!r:.200}; {index} says {weight_map.get(key)!r:.200}."
                )
            tensors[key] = tensor
    if missing := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(f"{index} names {len(missing)} keys that no shard holds, first {missing[0]!r:.200}.")
    return tensors


def open_weights(folder: Path, library: Library = "diffusers") -> dict[str, Tensor]:
    """Every tensor of a component's folder, sharded or not, by key."""
    path = find_weights(folder, library)
    return open_index(path) if path.suffix == ".json" else open_safetensors(path)
