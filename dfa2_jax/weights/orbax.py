"""Folders that `dfa2-convert` wrote: config.json, one Orbax checkpoint per component, tokenizers."""

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dfa2_jax.io.errors import CheckpointError, raise_faults, read_json
from dfa2_jax.weights.checkpoint import Checkpoint, check_pipeline
from dfa2_jax.weights.dtypes import FLOAT_DTYPES
from dfa2_jax.weights.leaf import Block, Leaf
from dfa2_jax.weights.spec import PipelineSpec

FORMAT, FORMAT_VERSION = "dfa2-jax checkpoint", 2
"""Version 1 had one type per component, and other names of the parameters."""


@dataclass(frozen=True)
class StoredArray:
    """What config.json says of one array: an object, which may say more in later versions."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, entry: Any) -> "StoredArray":
        """
        Raises:
            ValueError: the entry is no object, or lacks a dtype or a shape.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"{entry!r:.100} is not an object")
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype={dtype!r:.100} is not one of {sorted(FLOAT_DTYPES)}")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape={shape!r:.100} is not a list of sizes")
        return cls(jnp.dtype(dtype), tuple(shape))

    def content(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"dtype": self.dtype.name, "shape": list(self.shape)}

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class ConvertedCheckpoint(Checkpoint):
    """A folder that `dfa2-convert` wrote: config.json, one Orbax checkpoint per component, tokenizers."""

    def __init__(self, folder: Path, specs: Mapping[str, PipelineSpec]):
        path = folder / "config.json"
        config = read_json(path)
        if config.get("format") != FORMAT or config.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format={config.get('format')!r:.100}, "
                f"format_version={config.get('format_version')!r:.100}; this version reads {FORMAT!r}, "
                f"{FORMAT_VERSION}. Remove the folder and convert the diffusers folder or hub id SRC that it came from "
                f"again: `dfa2-convert SRC {shlex.quote(str(folder))}`."
            )
        try:
            components = {name: dict(entry) for name, entry in config["components"].items()}
            classes = {name: entry["class"] for name, entry in components.items()}
            configs = {name: dict(entry["config"]) for name, entry in components.items()}
            arrays = {name: dict(entry["arrays"]) for name, entry in components.items() if name != "scheduler"}
            self._fingerprint = str(config["fingerprint"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} lacks or garbles a field ({error!r:.200}): convert again.") from error
        self._arrays = {name: parse_arrays(f"{path}: {name}", entries) for name, entries in arrays.items()}
        super().__init__(folder, check_pipeline(path, config.get("pipeline_class"), classes, specs), classes, configs)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def stored_dtype(self, component: str) -> np.dtype:
        self.check_component(component)
        nbytes: Counter[np.dtype] = Counter()
        for array in self._arrays[component].values():
            nbytes[array.dtype] += array.nbytes
        return nbytes.most_common(1)[0][0] if nbytes else jnp.dtype("float32")

    def leaves(self, component: str) -> dict[tuple[Any, ...], Leaf]:
        folder, arrays = self.folder / "weights" / component, self._arrays.get(component, {})
        state = nnx.to_flat_state(nnx.state(self.abstract(component, self.stored_dtype(component))))
        leaves, faults = {}, {"arrays missing in config.json": [], "arrays without a parameter": [], "": []}
        for path, variable in state:
            name, shape = array_name(path), tuple(variable.shape)
            if name not in arrays:
                faults["arrays missing in config.json"].append(name)
            elif arrays[name].shape != shape:
                faults[""].append(f"{name} is {list(arrays[name].shape)} in config.json, {shape} in the model")
            else:
                try:
                    leaves[path] = open_zarr(folder / orbax_name(path), shape, arrays[name].dtype)
                except CheckpointError as error:
                    faults[""].append(str(error))
        names = {array_name(path) for path, _ in state}
        faults["arrays without a parameter"] += [name for name in arrays if name not in names]
        raise_faults(f"{folder} does not fit its config.json; convert again", faults)
        return leaves


def parse_arrays(owner: str, entries: Mapping[str, Any]) -> dict[str, StoredArray]:
    """Arrays by name.

    Raises:
        CheckpointError: an entry is none; the message begins with `owner`.
    """
    arrays = {}
    for name, entry in entries.items():
        try:
            arrays[name] = StoredArray.parse(entry)
        except ValueError as error:
            raise CheckpointError(
                f"{owner}.{name:.200} has an unusable entry ({error!s:.200}): convert again."
            ) from error
    return arrays


def array_name(path: tuple[Any, ...]) -> str:
    """The name of a parameter in config.json."""
    return ".".join(map(str, path))


def orbax_name(path: tuple[Any, ...]) -> str:
    """The folder of a parameter in an Orbax checkpoint of an NNX state."""
    return array_name(path) + ".value"


def open_zarr(folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> Leaf:
    """A parameter of an Orbax checkpoint (`use_ocdbt=False`), read in blocks of as many rows as one chunk holds."""
    import tensorstore as ts

    kvstore = {"driver": "file", "path": f"{folder}/"}
    try:
        # A chunk that is gone must not read as zeros.
        array = ts.open({"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}).result()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be opened: {error!s:.200}") from error
    if (array.shape, array.dtype.numpy_dtype) != (shape, dtype):
        raise CheckpointError(f"{folder} holds {array.dtype.name} {array.shape}, expected {dtype.name} {shape}")
    metadata = array.spec().to_json()["metadata"]
    chunk: tuple[int, ...] = tuple(metadata["chunks"])
    step = chunk[0]
    if metadata["compressor"] is not None or metadata["order"] != "C" or chunk[1:] != shape[1:] or shape[0] % step:
        raise CheckpointError(f"{folder} is not as dfa2-convert writes it, one uncompressed chunk per layer")
    nbytes = int(np.prod(chunk)) * dtype.itemsize

    def read(start: int) -> np.ndarray:
        """The chunk's file, mapped: TensorStore would copy it twice."""
        path = folder / ".".join(map(str, [start // step, *(0 for _ in chunk[1:])]))
        try:
            if (size := path.stat().st_size) != nbytes:
                raise CheckpointError(f"{path} cannot be read: it has {size} bytes, not {nbytes}. Convert again.")
            return np.memmap(path, dtype, "r", shape=chunk)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}. Convert again.") from error

    blocks = [Block(str(folder), start, partial(read, start)) for start in range(0, shape[0], step)]
    return Leaf(tuple(shape), dtype, blocks)
