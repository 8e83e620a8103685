"""Folders that `dfa2-convert` wrote: config.json, one Orbax checkpoint per component, tokenizers."""

from collections.abc import Mapping
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

FORMAT, FORMAT_VERSION = "dfa2-jax checkpoint", 1


class ConvertedCheckpoint(Checkpoint):
    """A folder that `dfa2-convert` wrote: config.json, one Orbax checkpoint per component, tokenizers."""

    def __init__(self, folder: Path, specs: Mapping[str, PipelineSpec]):
        path = folder / "config.json"
        config = read_json(path)
        if config.get("format") != FORMAT or config.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format={config.get('format')!r:.100}, "
                f"format_version={config.get('format_version')!r:.100}; this version reads {FORMAT!r}, "
                f"{FORMAT_VERSION}. Convert the diffusers folder again."
            )
        try:
            components = {name: dict(entry) for name, entry in config["components"].items()}
            classes = {name: entry["class"] for name, entry in components.items()}
            configs = {name: dict(entry["config"]) for name, entry in components.items()}
            self._dtypes = {name: entry["dtype"] for name, entry in components.items() if name != "scheduler"}
            self._fingerprint = str(config["fingerprint"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} lacks or garbles a field ({error!r:.200}): convert again.") from error
        for name, dtype in self._dtypes.items():
            if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"{path}: dtype={dtype!r:.100} of {name} is not one of {sorted(FLOAT_DTYPES)}.")
        super().__init__(folder, check_pipeline(path, config.get("pipeline_class"), classes, specs), classes, configs)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def stored_dtype(self, component: str) -> np.dtype:
        self.check_component(component)
        return jnp.dtype(self._dtypes[component])

    def leaves(self, component: str) -> dict[tuple[Any, ...], Leaf]:
        folder = self.folder / "weights" / component
        state = nnx.state(self.abstract(component, self.stored_dtype(component)))
        leaves, faults = {}, []
        for path, variable in nnx.to_flat_state(state):
            try:
                leaves[path] = open_zarr(folder / orbax_name(path), variable.shape, variable.dtype)
            except CheckpointError as error:
                faults.append(str(error))
        raise_faults(f"{folder} does not fit its config.json; convert again", {"": faults})
        return leaves


def orbax_name(path: tuple[Any, ...]) -> str:
    """The folder of a parameter in an Orbax checkpoint of an NNX state."""
    return ".".join(map(str, path)) + ".value"


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
            if (found := path.stat().st_size) != nbytes:
                raise CheckpointError(f"{path} cannot be read: it has {found} bytes, not {nbytes}. Convert again.")
            return np.memmap(path, dtype, "r", shape=chunk)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}. Convert again.") from error

    blocks = [Block(str(folder), start, partial(read, start)) for start in range(0, shape[0], step)]
    return Leaf(tuple(shape), dtype, blocks)
