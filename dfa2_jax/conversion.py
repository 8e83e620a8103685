"""A diffusers folder to one of ours: Orbax checkpoints of the stacked parameters, config.json, tokenizers."""

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import huggingface_hub
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx

from dfa2_jax.encoders.tokenizers import load_tokenizer
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.atomic import NameTaken, appearing, check_free, remove_leftovers
from dfa2_jax.io.digest import digest_of, file_sha256
from dfa2_jax.io.errors import CheckpointError, check_file
from dfa2_jax.io.hub import find_model, is_hub_id
from dfa2_jax.io.names import suggests_names
from dfa2_jax.pipeline.fit import check_fit, check_tokenizer
from dfa2_jax.weights.adapters import open_adapter
from dfa2_jax.weights.checkpoint import compute_dtype
from dfa2_jax.weights.diffusers import DiffusersCheckpoint
from dfa2_jax.weights.dtypes import as_precision
from dfa2_jax.weights.leaf import Block, Leaf, slabs
from dfa2_jax.weights.orbax import FORMAT, FORMAT_VERSION, StoredArray, array_name, orbax_name, signed_files

MAX_TOKENIZER_BYTES = 200_000_000
"""The most that the files of a tokenizer's folder may hold: T5's take 3 MB."""

HUB_FILES = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
"""What is fetched of a hub repository: component folders, not the single-file originals beside them."""

THREADS = 3
"""Each holds one slab: two cores turn, one waits for the file system."""


Arrays = dict[tuple[Any, ...], "LazyArray"]
"""A component's parameters by their paths in the model."""


class LazyArray:
    """A parameter that is read, turned and cast a slab at a time while Orbax writes it.

    digests: sha256 of every chunk that is written, by its place.
    """

    def __init__(self, leaf: Leaf, dtype: np.dtype):
        self.leaf, self.shape, self.dtype = leaf, leaf.shape, dtype
        self.size = int(np.prod(leaf.shape))
        self.nbytes = self.size * dtype.itemsize
        self.digests = [""] * len(leaf.blocks)


class Stopped(Exception):
    """The writers were asked to end."""


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `LazyArray` as Orbax writes a NumPy array, but one chunk per block, so that plain Orbax restores it.

    done: is told the bytes of each chunk.
    stopped: where it is set, the writers end.
    """

    def __init__(self, done: Callable[[int], None], stopped: Event) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.threads = ThreadPoolExecutor(THREADS)
        self.errors: list[Exception] = []
        self._done, self._stopped = done, stopped

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        rows = max((stop - start for start, stop in spans(value.leaf)), default=1)
        tspec["metadata"]["chunks"] = [rows, *value.shape[1:]] if value.shape else []
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        assert store.kvstore is not None  # a file store
        folder = Path(store.kvstore.path)

        def write(place: int, block: Block) -> None:
            name = [block.start // rows, *(0 for _ in value.shape[1:])]
            if not self.errors:
                try:
                    path = folder / ".".join(map(str, name))
                    nbytes, value.digests[place] = write_chunk(path, self._parts(block, value.dtype))
                    self._done(nbytes)
                except Exception as error:  # raised by `save_orbax`: raised here, it would leave writes behind
                    self.errors.append(error)

        loop, blocks = asyncio.get_running_loop(), enumerate(value.leaf.blocks)
        await asyncio.gather(*(loop.run_in_executor(self.threads, write, *block) for block in blocks))

    def _parts(self, block: Block, dtype: np.dtype) -> Iterator[np.ndarray]:
        for _, rows in slabs(block, dtype):
            if self._stopped.is_set():
                raise Stopped
            yield rows


def write_chunk(path: Path, arrays: Iterable[np.ndarray]) -> tuple[int, str]:
    """An uncompressed zarr chunk: the arrays' bytes. TensorStore would copy them first, a page fault per 4 kB.

    Returns:
        The bytes' number and hexadecimal sha256.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for array in arrays:
            rest = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            digest.update(rest)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # else what is written drives the source out of the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.tell(), digest.hexdigest()


def spans(leaf: Leaf) -> list[tuple[int, int]]:
    starts = [block.start for block in leaf.blocks]
    return list(zip(starts, [*starts[1:], leaf.shape[0]], strict=True))


@suggests_names
def convert_checkpoint(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    dtype: Any = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    download: bool = False,
    loras: Sequence[tuple[str | PathLike[str], float]] = (),
) -> Path:
    """Convert a diffusers folder, or a hub repository, to a folder that `Pipeline.from_pretrained` opens.

    Args:
        src: a folder, or `owner/name` on the hub: fetched with huggingface_hub into its own cache.
        dst: must not exist; it appears when it is complete, never before.
        dtype: of the weights; None keeps each component's. T5 and VAE never become float16 (they overflow). "float8",
            "int8" and "int8_weights" are of the transformer's blocks alone, and quantise them.
        progress: called with (bytes written, bytes in all).
        download: fetch a hub repository that the user's cache lacks.
        loras: files and scales of LoRAs that the weights are written with, before they are quantised.

    Raises:
        CheckpointError: what is wrong with the source, the destination or the disk.
    """
    dst = Path(dst)
    with disk_faults_named(dst):
        remove_leftovers(dst.parent)
        check_free(dst)
    checkpoint = open_source(src, download)
    checkpoint.adapters = tuple(open_adapter(checkpoint, file, scale) for file, scale in loras)
    checkpoint.check_scheduler()  # every fault that a config shows is found before the first write
    check_fit(checkpoint)
    tokenizers = fitting_tokenizers(checkpoint)
    arrays = lazy_arrays(checkpoint, dtype)
    precision = as_precision(dtype)
    total = sum(array.nbytes for component in arrays.values() for array in component.values())
    with disk_faults_named(dst), appearing(dst) as partial:
        check_room(partial, total)
        done = partial_sums(progress or (lambda done, total: None), total)
        supervise(
            lambda told, stopped: write_folder(partial, checkpoint, arrays, tokenizers, precision, told, stopped), done
        )
    return dst


@contextmanager
def disk_faults_named(dst: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: the code within cannot write, or the name is taken.
    """
    try:
        yield
    except NameTaken as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{dst} could not be written: {error.strerror or error}. Nothing was kept.") from error


def partial_sums(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """What tells `progress` the sum of all numbers so far, and the total."""
    written = 0

    def add(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        progress(written, total)

    return add


def supervise(work: Callable[[Callable[[int], None], Event], None], progress: Callable[[int], None]) -> None:
    """Run `work(told, stopped)` in a thread of its own, and hand on to `progress` what it tells.

    An exception here, as of Ctrl-C, stops the work, and goes on when that has ended.
    """
    told: SimpleQueue[int | None] = SimpleQueue()
    stopped = Event()
    with ThreadPoolExecutor(1) as thread:
        try:
            future = thread.submit(work, told.put, stopped)
            future.add_done_callback(lambda _: told.put(None))
            for nbytes in iter(told.get, None):
                progress(nbytes)
        finally:
            stopped.set()
    future.result()


def write_folder(
    folder: Path,
    checkpoint: DiffusersCheckpoint,
    arrays: Mapping[str, Arrays],
    tokenizers: Sequence[str],
    precision: str | None,
    told: Callable[[int], None],
    stopped: Event,
) -> None:
    """All that a converted folder holds."""
    for name, component in arrays.items():
        save_orbax(folder / "weights" / name, component, told, stopped)
    for name in tokenizers:
        (folder / name).mkdir()
        for path in tokenizer_files(checkpoint.tokenizer_folder(name)):
            shutil.copyfile(path, folder / name / path.name)
    write_config(folder, checkpoint, arrays, precision)


def fitting_tokenizers(checkpoint: DiffusersCheckpoint) -> list[str]:
    """Names of the tokenizers, one for each text encoder.

    Raises:
        CheckpointError: a tokenizer is missing, cannot be read, or does not fit its encoder.
    """
    encoders = [name for name in checkpoint.classes if "encoder" in name]
    tokenizers = [encoder.replace("text_encoder", "tokenizer") for encoder in encoders]
    for name, encoder in zip(tokenizers, encoders, strict=True):
        folder = checkpoint.tokenizer_folder(name)
        tokenizer_files(folder)
        check_tokenizer(folder, load_tokenizer(folder), encoder, checkpoint.config(encoder))
    return tokenizers


def tokenizer_files(folder: Path) -> list[Path]:
    """What is copied of a tokenizer's folder: its files.

    Raises:
        CheckpointError: one is no regular file, or they are larger than any tokenizer's.
    """
    files = sorted(path for path in folder.iterdir() if not path.is_dir())
    for path in files:
        check_file(path)
    if (nbytes := sum(path.stat().st_size for path in files)) > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{folder} has {nbytes:,} bytes, more than {MAX_TOKENIZER_BYTES:,}: remove some files.")
    return files


def lazy_arrays(checkpoint: DiffusersCheckpoint, dtype: Any) -> dict[str, Arrays]:
    """By component, every parameter in the type that it is written in."""
    arrays = {}
    for name in checkpoint.classes:
        if name == "scheduler":
            continue
        precision = as_precision(dtype) if name == "transformer" else None
        written = written_dtype(checkpoint, name, None if as_precision(dtype) else dtype)
        model, leaves = checkpoint.model_and_leaves(name, written, precision)
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        types = {path: np.dtype(variable.dtype) for path, variable in state} if precision else {}
        arrays[name] = {path: LazyArray(leaf, types.get(path, written)) for path, leaf in leaves.items()}
    return arrays


def check_room(folder: Path, nbytes: int) -> None:
    """
    Raises:
        CheckpointError: the disk has less than so many bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(f"{folder.parent} has {free:,} bytes free, the checkpoint needs {nbytes:,}: make room.")


def open_source(src: str | PathLike[str], download: bool) -> DiffusersCheckpoint:
    path = fetch(os.fspath(src)) if download and is_hub_id(src) else find_model(src)
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, DiffusersCheckpoint):
        raise CheckpointError(f"{path} is converted already: `Pipeline.from_pretrained` opens it as it is.")
    return checkpoint


def fetch(repository: str) -> Path:
    """The hub's snapshot in the user's own cache."""
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's errors have many types: offline, gated, absent, interrupted
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"There is no folder {repository}, and the hub gave no repository of that name: {reason:.300} "
            "Check the path, the connection, and `hf auth login` for gated models."
        ) from error


def written_dtype(checkpoint: DiffusersCheckpoint, component: str, dtype: Any) -> np.dtype:
    spec, stored = checkpoint.spec.components[component], checkpoint.stored_dtype(component)
    return stored if dtype is None else compute_dtype(spec, stored, dtype, "accelerator")


def save_orbax(folder: Path, arrays: Arrays, told: Callable[[int], None], stopped: Event) -> None:
    """An Orbax checkpoint of an NNX state, uncompressed: zstd takes 5 % off bfloat16 weights and half of the speed."""
    lazy = LazyArrayHandler(told, stopped)
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, lazy))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        node = tree
        for part in path:
            node = node.setdefault(str(part), {})
        node["value"] = array  # what an NNX variable adds to its path
        assert ".".join([*map(str, path), "value"]) == orbax_name(path)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), tree)
    except Exception as error:  # of many types; the disk is full, most of the time
        lazy.errors.append(error)
    finally:
        lazy.threads.shutdown(cancel_futures=True)
    for error in lazy.errors:
        if isinstance(error, CheckpointError | Stopped):
            raise error
        raise CheckpointError(f"{folder.name} could not be written: {error!s:.300}. Nothing was kept.") from error


def write_config(
    folder: Path, checkpoint: DiffusersCheckpoint, arrays: Mapping[str, Arrays], precision: str | None
) -> None:
    """Last of all: with the checksums of everything else."""
    components: dict[str, dict[str, Any]] = {
        name: {"class": kind, "config": checkpoint.configs[name]} for name, kind in checkpoint.classes.items()
    }
    stored = {
        name: {array_name(path): StoredArray(x.dtype, x.shape, tuple(x.digests)) for path, x in component.items()}
        for name, component in arrays.items()
    }
    for name, component in stored.items():
        components[name]["arrays"] = {path: array.content() for path, array in component.items()}
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "pipeline_class": checkpoint.pipeline_class,
        "fingerprint": checkpoint.adapted_fingerprint,
        "components": components,
        "files": {name: file_sha256(folder / name) for name in signed_files(folder, stored)},
        "versions": {name: version(name) for name in ("dfa2-jax", "jax", "orbax-checkpoint")},
    }
    content |= {} if precision is None else {"precision": precision}
    content |= {"loras": [x.content() for x in checkpoint.adapters]} if checkpoint.adapters else {}
    content |= {"digest": digest_of(content)}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
