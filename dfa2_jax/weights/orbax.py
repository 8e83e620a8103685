"""Folders that `dfa2-convert` wrote: config.json, one Orbax checkpoint per component, tokenizers."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import nnx

from dfa2_jax.io.digest import digest_of, file_sha256
from dfa2_jax.io.errors import CheckpointError, raise_faults, read_json
from dfa2_jax.weights.checkpoint import Checkpoint, check_pipeline
from dfa2_jax.weights.chunks import CheckedAhead, Chunk
from dfa2_jax.weights.dtypes import EIGHT_BITS, FLOAT_DTYPES, PRECISIONS, Precision
from dfa2_jax.weights.leaf import Block, Leaf
from dfa2_jax.weights.quantized import Place
from dfa2_jax.weights.spec import PipelineSpec

FORMAT, FORMAT_VERSION = "dfa2-jax checkpoint", 2
"""Version 1 had one type per component, and other names of the parameters."""

UNSIGNED = {"config.json", "_CHECKPOINT_METADATA"}
"""Names of files without a checksum: the first carries its own, Orbax writes the time into the second."""


@dataclass(frozen=True)
class StoredArray:
    """What config.json says of one array: an object, which may say more in later versions.

    digests: hexadecimal sha256 of each chunk's file; the chunks divide the leading axis evenly.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    digests: tuple[str, ...]

    @classmethod
    def parse(cls, entry: Any) -> "StoredArray":
        """
        Raises:
            ValueError: the entry is no object, or lacks a dtype, a shape or checksums.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"{entry!r:.100} is not an object")
        dtype, shape, digests = entry.get("dtype"), entry.get("shape"), entry.get("sha256")
        if not isinstance(dtype, str) or dtype not in (*FLOAT_DTYPES, *EIGHT_BITS):
            raise ValueError(f"dtype={dtype!r:.100} is not one of {sorted((*FLOAT_DTYPES, *EIGHT_BITS))}")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape={shape!r:.100} is not a list of sizes")
        if not isinstance(digests, list) or not all(isinstance(x, str) and SHA256.fullmatch(x) for x in digests):
            raise ValueError(f"sha256={digests!r:.100} is not a list of checksums")
        if not digests or not shape or shape[0] % len(digests):
            raise ValueError(f"sha256 has {len(digests)} checksums, which do not divide {shape=!r:.100}")
        return cls(jnp.dtype(dtype), tuple(shape), tuple(digests))

    def content(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"dtype": self.dtype.name, "shape": list(self.shape), "sha256": list(self.digests)}

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.shape[0] // len(self.digests), *self.shape[1:])

    def chunks(self, root: Path, component: str, name: str) -> list[Chunk]:
        """Its files in a converted folder, in the order of their rows."""
        folder = array_folder(root, component, name)
        files = (folder / ".".join(map(str, [i, *(0 for _ in self.shape[1:])])) for i in range(len(self.digests)))
        return [
            Chunk(f"{component}.{name}", file, self.dtype, self.chunk_shape, digest, root)
            for file, digest in zip(files, self.digests, strict=True)
        ]


SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Contents:
    """config.json of a converted folder.

    classes: of each component, the scheduler among them.
    configs: each component's own config.
    arrays: of each component but the scheduler, by name.
    precision: of the transformer's blocks, one of `PRECISIONS`; None: their own dtype.
    files: sha256 of every file but the arrays' chunks (and `UNSIGNED`), by path in the folder.
    digest: of all this.
    """

    pipeline_class: Any
    fingerprint: str
    classes: dict[str, str]
    configs: dict[str, dict[str, Any]]
    arrays: dict[str, dict[str, StoredArray]]
    files: dict[str, str]
    digest: str
    precision: Precision | None = None

    @classmethod
    def read(cls, folder: Path, verify: bool = True) -> "Contents":
        """
        Args:
            verify: compare the file with its own digest.

        Raises:
            CheckpointError: config.json is of another format, or lacks a field, or differs from its digest.
        """
        path = folder / "config.json"
        config = read_json(path)
        if config.get("format") != FORMAT or config.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format={config.get('format')!r:.100}, "
                f"format_version={config.get('format_version')!r:.100}; this version reads {FORMAT!r}, "
                f"{FORMAT_VERSION}. {convert_again(folder)}."
            )
        if not isinstance(digest := config.pop("digest", None), str):
            raise CheckpointError(f"{path} has no digest: the folder carries no checksums. {convert_again(folder)}.")
        if verify and digest != (own := digest_of(config)):
            raise CheckpointError(
                f"{path}: digest is {digest!r:.100}, but the content's is {own!r}: it was edited or damaged. "
                f"{convert_again(folder)}."
            )
        try:
            components = {name: dict(entry) for name, entry in config["components"].items()}
            classes = {name: entry["class"] for name, entry in components.items()}
            configs = {name: dict(entry["config"]) for name, entry in components.items()}
            arrays = {name: dict(entry["arrays"]) for name, entry in components.items() if name != "scheduler"}
            fingerprint, files = str(config["fingerprint"]), {**config["files"]}
            if (precision := config.get("precision")) not in (None, *PRECISIONS):
                raise ValueError(f"precision={precision!r:.100}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} lacks or garbles a field ({error!r:.200}). {convert_again(folder)}."
            ) from error
        parsed = {name: parse_arrays(folder, name, entries) for name, entries in arrays.items()}
        return cls(config.get("pipeline_class"), fingerprint, classes, configs, parsed, files, digest, precision)

    def changed_files(self, folder: Path, within: str = ".") -> dict[str, list[str]]:
        """By kind of change, the files that are not as they were written, `within` a folder in this one."""
        known = [name for name in sorted(self.files) if Path(name).is_relative_to(within)]
        there = [name for name in known if (folder / name).is_file()]
        changed = [name for name in there if file_sha256(folder / name) != self.files[name]]
        return {"files missing": sorted({*known} - {*there}), "files changed": changed}

    def unknown_files(self, folder: Path, within: str = ".") -> list[str]:
        """Those without a checksum, `within` a folder in this one."""
        return [name for name in signed_files(folder, self.arrays, within) if name not in self.files]


class ConvertedCheckpoint(Checkpoint):
    """A folder that `dfa2-convert` wrote: config.json, one Orbax checkpoint per component, tokenizers.

    Args:
        verify: compare config.json, tokenizers and, as they are read, all weights with their checksums.
    """

    def __init__(self, folder: Path, specs: Mapping[str, PipelineSpec], verify: bool = True):
        contents = Contents.read(folder, verify)
        self._contents, self._verify = contents, verify
        spec = check_pipeline(folder / "config.json", contents.pipeline_class, contents.classes, specs)
        super().__init__(folder, spec, contents.classes, contents.configs)

    @property
    def precision(self) -> Precision | None:
        return self._contents.precision

    @property
    def fingerprint(self) -> str:
        return self._contents.fingerprint

    @cached_property
    def folder_digest(self) -> str:
        """The digest of config.json, which holds the checksums of everything else, and whether they were compared."""
        return self._contents.digest + ("" if self._verify else ", unverified")

    def tokenizer_folder(self, name: str) -> Path:
        path = super().tokenizer_folder(name)
        if self._verify:
            headline = f"{path} has changed since it was converted. {convert_again(self.folder)}"
            unknown = self._contents.unknown_files(self.folder, name)
            raise_faults(headline, self._contents.changed_files(self.folder, name) | {"files unknown": unknown})
        return path

    def stored_dtype(self, component: str) -> np.dtype:
        self.check_component(component)
        nbytes: Counter[np.dtype] = Counter()
        for array in self._contents.arrays[component].values():
            if array.dtype.name in FLOAT_DTYPES:
                nbytes[array.dtype] += array.nbytes
        return nbytes.most_common(1)[0][0] if nbytes else jnp.dtype("float32")

    def leaves(self, component: str) -> dict[tuple[Any, ...], Leaf]:
        folder, arrays = self.folder / "weights" / component, self._contents.arrays.get(component, {})
        state = nnx.to_flat_state(nnx.state(self.abstract(component, self.stored_dtype(component)), nnx.Not(Place)))
        fitting, faults = {}, {"arrays missing in config.json": [], "arrays without a parameter": [], "": []}
        for path, variable in state:
            name, shape = array_name(path), tuple(variable.shape)
            if name not in arrays:
                faults["arrays missing in config.json"].append(name)
            elif arrays[name].shape != shape:
                faults[""].append(f"{name} is {list(arrays[name].shape)} in config.json, {shape} in the model")
            else:
                try:
                    check_zarr(array_folder(self.folder, component, name), arrays[name])
                    fitting[path] = arrays[name].chunks(self.folder, component, name)
                except CheckpointError as error:
                    faults[""].append(str(error))
        names = {array_name(path) for path, _ in state}
        faults["arrays without a parameter"] += [name for name in arrays if name not in names]
        raise_faults(f"{folder} does not fit its config.json; convert again", faults)
        return leaves_of({path: arrays[array_name(path)] for path in fitting}, fitting, self._verify)


def leaves_of(
    arrays: Mapping[tuple[Any, ...], StoredArray], chunks: Mapping[tuple[Any, ...], Sequence[Chunk]], verify: bool
) -> dict[tuple[Any, ...], Leaf]:
    """Parameters whose blocks are chunks, checked where `verify` says so: ahead of their reader, in this order."""
    ahead = CheckedAhead([chunk for some in chunks.values() for chunk in some])
    leaves = {}
    for path, some in chunks.items():
        rows = arrays[path].chunk_shape[0]
        blocks = [
            Block(str(chunk.path.parent), i * rows, partial(ahead.read, chunk) if verify else chunk.map)
            for i, chunk in enumerate(some)
        ]
        leaves[path] = Leaf(arrays[path].shape, arrays[path].dtype, blocks)
    return leaves


def convert_again(folder: Path) -> str:
    """What to do with a folder that cannot be used."""
    return (
        "Remove the folder and convert the diffusers folder or hub id SRC that it came from again: "
        f"`dfa2-convert SRC {shlex.quote(str(folder))}`"
    )


def parse_arrays(folder: Path, component: str, entries: Mapping[str, Any]) -> dict[str, StoredArray]:
    """Arrays by name.

    Raises:
        CheckpointError: an entry is none.
    """
    arrays = {}
    for name, entry in entries.items():
        try:
            arrays[name] = StoredArray.parse(entry)
        except ValueError as error:
            raise CheckpointError(
                f"{folder / 'config.json'}: {component}.{name:.200} has an unusable entry ({error!s:.200}). "
                f"{convert_again(folder)}."
            ) from error
    return arrays


def array_name(path: tuple[Any, ...]) -> str:
    """The name of a parameter in config.json."""
    return ".".join(map(str, path))


def orbax_name(path: tuple[Any, ...]) -> str:
    """The folder of a parameter in an Orbax checkpoint of an NNX state."""
    return array_name(path) + ".value"


def array_folder(folder: Path, component: str, name: str) -> Path:
    """Where a converted folder has the array that config.json calls `name`."""
    return folder / "weights" / component / f"{name}.value"


def signed_files(folder: Path, arrays: Mapping[str, Mapping[str, StoredArray]], within: str = ".") -> list[str]:
    """Paths in a converted folder, or `within` a folder in it, of all files but the arrays' chunks and `UNSIGNED`."""
    chunks = {
        chunk.path
        for component, some in arrays.items()
        for name, array in some.items()
        for chunk in array.chunks(folder, component, name)
    }
    files = [path for path in sorted((folder / within).rglob("*")) if path.is_file() and path not in chunks]
    return [str(path.relative_to(folder)) for path in files if path.name not in UNSIGNED]


def check_zarr(folder: Path, array: StoredArray) -> None:
    """An array of an Orbax checkpoint (`use_ocdbt=False`) is as config.json says and as dfa2-convert writes it.

    Raises:
        CheckpointError: it cannot be opened, or is of another type, shape or layout.
    """
    try:
        stored = ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}).result()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be opened: {error!s:.200}") from error
    dtype, shape = array.dtype, array.shape
    if (stored.shape, stored.dtype.numpy_dtype) != (shape, dtype):
        raise CheckpointError(f"{folder} holds {stored.dtype.name} {stored.shape}, expected {dtype.name} {shape}")
    metadata = stored.spec().to_json()["metadata"]
    if (metadata["compressor"], metadata["order"], tuple(metadata["chunks"])) != (None, "C", array.chunk_shape):
        raise CheckpointError(f"{folder} is not as dfa2-convert writes it, uncompressed chunks of {array.chunk_shape}")
