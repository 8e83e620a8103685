"""A diffusers folder to one of ours: Orbax checkpoints of the stacked parameters, config.json, tokenizers."""

import argparse
import asyncio
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.typing import DTypeLike
from tqdm import tqdm

from dfa2_jax.encoders.tokenizers import load_tokenizer
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.options import suggests_names
from dfa2_jax.weights.checkpoint import compute_dtype
from dfa2_jax.weights.diffusers import DiffusersCheckpoint
from dfa2_jax.weights.dtypes import FLOAT_DTYPES
from dfa2_jax.weights.leaf import Block, Leaf, slabs
from dfa2_jax.weights.orbax import FORMAT, FORMAT_VERSION, StoredArray, array_name, orbax_name

HUB_FILES = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
"""Of a hub repository: what lies in component folders, not the single-file originals beside them."""

THREADS = 3
"""Each holds one slab: two cores turn, one waits for the file system."""


Arrays = dict[tuple[Any, ...], "LazyArray"]
"""A component's parameters by their paths in the model."""


class LazyArray:
    """A parameter that is read, turned and cast a slab at a time while Orbax writes it."""

    def __init__(self, leaf: Leaf, dtype: np.dtype, done: Callable[[int], None]):
        self.leaf, self.shape, self.dtype, self.done = leaf, leaf.shape, dtype, done
        self.size = int(np.prod(leaf.shape))
        self.nbytes = self.size * dtype.itemsize


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `LazyArray` as Orbax writes a NumPy array, but one chunk per block, so that plain Orbax restores it."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._threads = ThreadPoolExecutor(THREADS)
        self.errors: list[Exception] = []

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        rows = max((stop - start for start, stop in spans(value.leaf)), default=1)
        tspec["metadata"]["chunks"] = [rows, *value.shape[1:]] if value.shape else []
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        assert store.kvstore is not None  # a file store
        folder = Path(store.kvstore.path)

        def write(block: Block) -> None:
            if self.errors:
                return
            try:
                name = [block.start // rows, *(0 for _ in value.shape[1:])]
                nbytes = write_chunk(folder / ".".join(map(str, name)), (rows for _, rows in slabs(block, value.dtype)))
            except Exception as error:  # raised by `save_orbax`: raised here, it would leave writes behind
                self.errors.append(error)
            else:
                loop.call_soon_threadsafe(value.done, nbytes)

        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._threads, write, block) for block in value.leaf.blocks))


def write_chunk(path: Path, arrays: Iterable[np.ndarray]) -> int:
    """An uncompressed zarr chunk: the arrays' bytes. TensorStore would copy them first, a page fault per 4 kB."""
    with path.open("wb", buffering=0) as file:
        for array in arrays:
            rest = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # else what is written drives the source out of the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.tell()


def spans(leaf: Leaf) -> list[tuple[int, int]]:
    starts = [block.start for block in leaf.blocks]
    return list(zip(starts, [*starts[1:], leaf.shape[0]], strict=True))


@suggests_names
def convert_checkpoint(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Convert a diffusers folder, or a hub repository, to a folder that `Pipeline.from_pretrained` opens.

    Args:
        src: a folder, or `owner/name` on the hub: fetched with huggingface_hub into its own cache.
        dst: must not exist; it appears when it is complete, never before.
        dtype: of the weights; None keeps each component's. T5 and VAE never become float16 (they overflow).
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: what is wrong with the source, the destination or the disk.
    """
    dst = Path(dst)
    if dst.exists() or dst.is_symlink():
        raise CheckpointError(f"{dst} exists already: remove it, or choose another destination.")
    checkpoint = open_source(src)
    written = 0

    def done(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        progress(written, total)

    arrays = lazy_arrays(checkpoint, dtype, done)  # every fault is found before the first write
    checkpoint.check_scheduler()
    tokenizers = [f"tokenizer{name[12:]}" for name in arrays if "encoder" in name]
    for name in tokenizers:
        load_tokenizer(checkpoint.tokenizer_folder(name))
    total = sum(array.nbytes for component in arrays.values() for array in component.values())
    partial = make_room(dst, total)
    try:
        for name, component in arrays.items():
            save_orbax(partial / "weights" / name, component)
        for name in tokenizers:
            shutil.copytree(checkpoint.tokenizer_folder(name), partial / name)
        write_config(partial / "config.json", checkpoint, arrays)
        partial.chmod(0o755)  # mkdtemp made it private
        sync_tree(partial)
        os.rename(partial, dst)
        sync(dst.parent)
    except OSError as error:
        raise CheckpointError(f"{dst} could not be written: {error.strerror or error}. Nothing was kept.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after the rename it is gone
    return dst


def lazy_arrays(
    checkpoint: DiffusersCheckpoint, dtype: DTypeLike | None, done: Callable[[int], None]
) -> dict[str, Arrays]:
    """By component, every parameter in the type that it is written in."""
    arrays = {}
    for name in checkpoint.classes:
        if name != "scheduler":
            written = written_dtype(checkpoint, name, dtype)
            arrays[name] = {path: LazyArray(leaf, written, done) for path, leaf in checkpoint.leaves(name).items()}
    return arrays


def make_room(dst: Path, nbytes: int) -> Path:
    """A new folder beside `dst`, on a disk that holds so many bytes more.

    Raises:
        CheckpointError: there is no such room.
    """
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dst.parent).free
        if free < nbytes:
            raise CheckpointError(f"{dst.parent} has {free:,} bytes free, the checkpoint needs {nbytes:,}: make room.")
        return Path(tempfile.mkdtemp(prefix=f".{dst.name}.partial-", dir=dst.parent))
    except OSError as error:
        raise CheckpointError(f"{dst.parent} cannot be written: {error.strerror or error}.") from error


def open_source(src: str | PathLike[str]) -> DiffusersCheckpoint:
    path = Path(src)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(src)):
        path = download(os.fspath(src))
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, DiffusersCheckpoint):
        raise CheckpointError(f"{path} is converted already: `Pipeline.from_pretrained` opens it as it is.")
    return checkpoint


def download(repository: str) -> Path:
    """The hub's snapshot in the user's own cache."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's errors have many types: offline, gated, absent, interrupted
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"There is no folder {repository}, and the hub gave no repository of that name: {reason:.300} "
            "Check the path, the connection, and `hf auth login` for gated models."
        ) from error


def written_dtype(checkpoint: DiffusersCheckpoint, component: str, dtype: DTypeLike | None) -> np.dtype:
    spec, stored = checkpoint.spec.components[component], checkpoint.stored_dtype(component)
    return stored if dtype is None else compute_dtype(spec, stored, dtype, "accelerator")


def save_orbax(folder: Path, arrays: Arrays) -> None:
    """An Orbax checkpoint of an NNX state, uncompressed: zstd takes 5 % off bfloat16 weights and half of the speed."""
    lazy = LazyArrayHandler()
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, lazy))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        node = tree
        for part in path:
            node = node.setdefault(str(part), {})
        node["value"] = array  # what an NNX variable adds to its path
        assert ".".join([*map(str, path), "value"]) == orbax_name(path)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), tree)
    for error in lazy.errors:
        if isinstance(error, CheckpointError):
            raise error
        raise CheckpointError(f"{folder} could not be written: {error!s:.300}. Nothing was kept.") from error


def write_config(path: Path, checkpoint: DiffusersCheckpoint, arrays: Mapping[str, Arrays]) -> None:
    components: dict[str, dict[str, Any]] = {
        name: {"class": kind, "config": checkpoint.configs[name]} for name, kind in checkpoint.classes.items()
    }
    for name, component in arrays.items():
        stored = {path: StoredArray(array.dtype, array.shape) for path, array in component.items()}
        components[name]["arrays"] = {array_name(path): array.content() for path, array in stored.items()}
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "pipeline_class": checkpoint.pipeline_class,
        "fingerprint": checkpoint.fingerprint,
        "components": components,
        "versions": {name: version(name) for name in ("dfa2-jax", "jax", "orbax-checkpoint")},
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, or 2 with one line on stderr, or 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="dfa2-convert", description="Convert a diffusers folder to Orbax.")
    parser.add_argument("src", metavar="SRC", help="a diffusers folder, or a hub id such as owner/name")
    parser.add_argument("dst", metavar="DST", help="the folder to write; must not exist")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, help="of the weights (default: as stored)")
    args = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what it does not do
    try:
        with tqdm(unit="B", unit_scale=True, desc="convert") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            convert_checkpoint(args.src, args.dst, args.dtype, progress=progress)
    except (CheckpointError, OSError) as error:
        print(f"dfa2-convert: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dfa2-convert: interrupted, nothing was kept", file=sys.stderr)
        return 130
    print(args.dst)
    return 0


if __name__ == "__main__":
    sys.exit(main())
