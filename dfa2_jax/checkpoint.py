"""Opened checkpoints: what a diffusers folder and a converted one have in common, and loading either into a model.

A parameter is loaded in blocks along its leading axis, one layer at a time, straight into its final array. So the peak
of memory is the final arrays plus one layer, whatever the size of the checkpoint.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

FORMAT, FORMAT_VERSION = "dfa2-jax checkpoint", 1
FLOAT_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# Activations of these leave float16's range: T5-XXL in its MLPs, the autoencoder in its last decoder blocks.
OVERFLOWING = {"T5EncoderModel": "bfloat16", "AutoencoderKL": "float32"}

CLIP_PROJECTED, T5 = ("CLIPTextModelWithProjection",), ("T5EncoderModel",)
SHARED = {"vae": ("AutoencoderKL",), "scheduler": ("FlowMatchEulerDiscreteScheduler",)}
PIPELINES: dict[str, dict[str, tuple[str, ...]]] = {
    "StableDiffusion3Pipeline": {
        "transformer": ("SD3Transformer2DModel",),
        "text_encoder": CLIP_PROJECTED,
        "text_encoder_2": CLIP_PROJECTED,
        "text_encoder_3": T5,
        **SHARED,
    },
    "FluxPipeline": {
        "transformer": ("FluxTransformer2DModel",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": T5,
        **SHARED,
    },
}
"""Supported pipelines: the class that each component must have. Transformer and scheduler must be there."""

MAX_JSON_BYTES = 10_000_000  # FLUX.1's index of 1,160 keys has 120 kB
HOST_BYTES = 8_000_000  # smaller parameters are put together on the host: one transfer, and no program to compile


class CheckpointError(ValueError):
    """A checkpoint folder or file cannot be used. The message names file, field, both values and the way out."""


def compute_dtype(class_name: str, stored: DTypeLike, requested: DTypeLike | None, platform: str) -> np.dtype:
    """The dtype that a component is loaded in.

    Without a request it is the stored one, and float32 on CPU. Where float16 would overflow (T5, autoencoder) the
    component takes bfloat16 or float32 instead, asked for or not.
    """
    dtype = jnp.dtype(requested if requested is not None else "float32" if platform == "cpu" else stored)
    if dtype.name not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype={dtype.name} is not supported: use one of {sorted(FLOAT_DTYPES)}.")
    return jnp.dtype(OVERFLOWING.get(class_name, dtype)) if dtype == jnp.float16 else dtype


class Block(NamedTuple):
    """Rows `start` to `start + len(read())` of a parameter's leading axis. `source` names where they come from."""

    source: str
    start: int
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Leaf:
    """One parameter as stored: `blocks` cover its leading axis; of one with a layer axis, a block is one layer."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Sequence[Block]


class Checkpoint(ABC):
    """A pipeline's weights, configs and tokenizers, in whichever of the two folder formats."""

    def __init__(self, folder: Path, pipeline_class: str, classes: Mapping[str, str], configs: Mapping[str, Any]):
        self.folder = folder
        self.pipeline_class = pipeline_class
        self.classes = dict(classes)
        self.configs = dict(configs)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal sha256 that names the transformer's source weights; both formats and all dtypes agree."""

    @abstractmethod
    def stored_dtype(self, component: str) -> np.dtype:
        """The dtype of the component's weights as stored (of most of them, where they differ)."""

    @abstractmethod
    def leaves(self, component: str) -> dict[tuple[Any, ...], Leaf]:
        """Every parameter of the component by its path in the model, all shapes checked."""

    def check_component(self, component: str) -> None:
        if component not in self.classes:
            raise CheckpointError(f"{self.folder} has no component '{component}'; it has {sorted(self.classes)}.")

    def tokenizer_folder(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_dir():
            raise CheckpointError(f"{path} is missing: the pipeline cannot read prompts without this tokenizer.")
        return path

    def abstract(self, component: str, dtype: DTypeLike) -> nnx.Module:
        """The component's model with shapes in place of arrays."""
        from dfa2_jax.models import MODELS

        self.check_component(component)
        kind = MODELS[self.classes[component]]
        try:
            config = kind.config_from_json(self.configs[component])
            return nnx.eval_shape(lambda: kind.build(config, dtype=dtype, rngs=nnx.Rngs(0)))
        except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise CheckpointError(f"The {component} in {self.folder} has an unusable config.json: {error}") from error

    def load(self, component: str, dtype: DTypeLike | None = None) -> nnx.Module:
        """The component's model with its weights on the default device (see `compute_dtype` for `dtype`).

        Raises:
            CheckpointError: weights are missing, unknown or misshapen, or not finite in float16.
        """
        self.check_component(component)
        stored = self.stored_dtype(component)
        dtype = compute_dtype(self.classes[component], stored, dtype, jax.default_backend())
        graph, state = nnx.split(self.abstract(component, dtype))
        leaves = self.leaves(component)
        filled = []
        for path, variable in nnx.to_flat_state(state):
            # Only trainable parameters live on the device: SD3's position table (452 MB) is cropped on the host.
            on_device = isinstance(variable, nnx.Param)
            filled.append((path, variable.replace(load_leaf(leaves[path], variable.dtype, on_device=on_device))))
        return nnx.merge(graph, nnx.from_flat_state(filled))


def must_be_finite(source: np.dtype, target: np.dtype) -> bool:
    """Only float16 overflows in practice: bfloat16 and float32 share their range."""
    return np.float16 in (source, target)


def overflow_error(block: Block, dtype: np.dtype) -> CheckpointError:
    return CheckpointError(
        f"{block.source} holds values that are not finite in {dtype.name}: load or convert it with dtype=bfloat16, "
        "or get the file again if its own values are broken."
    )


def on_host(leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    """The whole parameter as a NumPy array of `dtype`."""
    array = np.empty(leaf.shape, dtype)
    for block in leaf.blocks:
        rows = block.read()
        place = array[block.start : block.start + len(rows)]
        with np.errstate(over="ignore"):  # reported below, by name
            place[...] = rows.astype(dtype, copy=False)
        if must_be_finite(leaf.dtype, dtype) and not np.isfinite(place).all():
            raise overflow_error(block, dtype)
    return array


@partial(jax.jit, donate_argnums=0, static_argnames=("axes", "check"))
def place(target: jax.Array, rows: jax.Array, start: jax.Array, *, axes: tuple[int, ...], check: bool) -> Any:
    """`target` with `rows.transpose(axes)` from `start` on, in place; and whether they are finite, if to `check`."""
    rows = rows.transpose(axes).astype(target.dtype)
    finite = jnp.isfinite(rows).all() if check else jnp.array(True)
    return jax.lax.dynamic_update_slice_in_dim(target, rows, start, axis=0), finite


def put(rows: np.ndarray) -> tuple[jax.Array, tuple[int, ...]]:
    """`rows` on the device and the axes that bring them into order there.

    A view of a torch kernel is strided. On CPU, device_put itself transposes at the speed of a plain copy (1.5 GB/s a
    core, five times XLA's own transpose); on an accelerator the bytes go over as they lie and turn there.
    """
    if jax.default_backend() == "cpu":
        return jax.device_put(rows), tuple(range(rows.ndim))
    order = tuple(int(axis) for axis in np.argsort([-stride for stride in rows.strides], kind="stable"))
    return jax.device_put(rows.transpose(order)), tuple(int(axis) for axis in np.argsort(order))


def load_leaf(leaf: Leaf, dtype: np.dtype, *, on_device: bool) -> jax.Array | np.ndarray:
    """The parameter as one array, filled block by block."""
    if not on_device:
        return on_host(leaf, dtype)
    if int(np.prod(leaf.shape)) * dtype.itemsize <= HOST_BYTES:
        return jax.device_put(on_host(leaf, dtype))
    array = jnp.zeros(leaf.shape, dtype)
    check = must_be_finite(leaf.dtype, dtype)
    for block in leaf.blocks:
        rows, axes = put(block.read())
        array, finite = place(array, rows, np.int32(block.start), axes=axes, check=check)
        if check and not finite:
            raise overflow_error(block, dtype)
        array.block_until_ready()  # else blocks pile up in memory faster than they are placed
        del rows  # else two layers lie in memory while the next is put
    return array


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file, refusing what a damaged or hostile file can hold."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"duplicate key {max(names, key=names.count)!r:.200}")
        return found

    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path} has {size} bytes, more than the {max_bytes} that such a file may have.")
        content = json.loads(path.read_bytes().decode(), object_pairs_hook=unique)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not valid JSON: {error!s:.200}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def check_pipeline(path: Path, pipeline_class: Any, classes: Mapping[str, str]) -> None:
    """Refuse pipelines and components of other classes, by name."""
    if pipeline_class not in PIPELINES:
        raise CheckpointError(f"{path} is of a {pipeline_class!r:.200}; supported are {sorted(PIPELINES)}.")
    for component, allowed in PIPELINES[pipeline_class].items():
        found = classes.get(component)
        if found is None and component in ("transformer", "scheduler"):
            raise CheckpointError(f"{path} names no {component}: a {pipeline_class} needs {allowed[0]}.")
        if found is not None and found not in allowed:
            raise CheckpointError(f"{path} has {component}={found!r:.200}; a {pipeline_class} needs {allowed[0]}.")


class ConvertedCheckpoint(Checkpoint):
    """A folder that `dfa2-convert` wrote: config.json, one Orbax checkpoint per component, tokenizers."""

    def __init__(self, folder: Path):
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
            if dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"{path}: dtype={dtype!r:.100} of {name} is not one of {sorted(FLOAT_DTYPES)}.")
        check_pipeline(path, config.get("pipeline_class"), classes)
        super().__init__(folder, config["pipeline_class"], classes, configs)

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


def raise_faults(headline: str, faults: Mapping[str, Sequence[str]], shown: int = 8) -> None:
    """One error for all faults, `shown` of each kind; nothing where there are none."""
    lines = []
    for kind, found in faults.items():
        if found:
            more = [f"... and {len(found) - shown} more"] if len(found) > shown else []
            prefix = f"{len(found)} {kind}: " if kind else ""
            lines.append(prefix + "; ".join([*(f"{fault:.300}" for fault in found[:shown]), *more]))
    if lines:
        raise CheckpointError(f"{headline}.\n" + "\n".join(lines))


def open_checkpoint(folder: str | PathLike[str]) -> Checkpoint:
    """Open a diffusers pipeline folder or one that `dfa2-convert` wrote; reads no weights yet.

    Raises:
        CheckpointError: the folder is neither, or is damaged, or holds another kind of pipeline.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Hub ids are for dfa2-convert, which downloads them.")
    if (folder / "model_index.json").exists():
        from convert import DiffusersCheckpoint

        return DiffusersCheckpoint(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds neither model_index.json (diffusers) nor config.json (dfa2-convert).")
    config = read_json(folder / "config.json")
    if name := config.get("_class_name"):
        raise CheckpointError(f"{folder} is a single {name!r:.200}; give the pipeline folder that holds it.")
    return ConvertedCheckpoint(folder)
