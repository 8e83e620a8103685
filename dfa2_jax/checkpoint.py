"""Opened checkpoints: what a diffusers folder and a converted one have in common, and loading either into a model.

A parameter is loaded straight into its final array, on the host by slabs of a few megabytes, on an accelerator by
layers. So the peak of memory is the final arrays and little more, whatever the size of the checkpoint.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from .faults import CheckpointError, blame, check_fields, raise_faults, read_json
from .schedule import flow_match_sigmas
from .tokenizers import Tokenizer

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

HOST_BYTES = 8_000_000  # smaller parameters are put together on the host: one transfer, and no program to compile
SLAB_BYTES = 2**22  # what is read, turned and cast at once there


def compute_dtype(class_name: str, stored: DTypeLike, requested: DTypeLike | None, platform: str) -> np.dtype:
    """The dtype that a component is loaded in.

    Without a request it is the stored one, and float32 on CPU. Where float16 would overflow (T5, autoencoder) the
    component takes bfloat16 or float32 instead, asked for or not.
    """
    try:
        dtype = jnp.dtype(requested if requested is not None else "float32" if platform == "cpu" else stored)
    except TypeError as error:
        raise CheckpointError(f"dtype={requested!r} is not supported: use one of {sorted(FLOAT_DTYPES)}.") from error
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

    def tokenizer(self, name: str) -> Tokenizer:
        folder = self.tokenizer_folder(name)
        with blame(f"{folder} is not a tokenizer that can be read"):
            return Tokenizer.load(folder)

    def check_schedule(self) -> None:
        """Make schedules, so that a scheduler_config.json that cannot is seen before any weight is."""
        with blame(f"The scheduler in {self.folder} has an unusable scheduler_config.json"):
            for sigmas in (2, [1.0, 0.5]):
                found = flow_match_sigmas(self.configs["scheduler"], sigmas, 4096)
                if not np.isfinite(found).all():
                    raise ValueError(f"its sigmas are {found.tolist()}")

    def config(self, component: str) -> Any:
        """The component's config.json as the model's own type, every field of the type that it declares."""
        from dfa2_jax.models import MODELS

        self.check_component(component)
        with blame(f"The {component} in {self.folder} has an unusable config.json"):
            config = MODELS[self.classes[component]].config_from_json(self.configs[component])
            check_fields(config)
            return config

    def abstract(self, component: str, dtype: DTypeLike) -> nnx.Module:
        """The component's model with shapes in place of arrays."""
        from dfa2_jax.models import MODELS

        config, kind = self.config(component), MODELS[self.classes[component]]
        with blame(f"The {component} in {self.folder} has an unusable config.json"):
            return nnx.eval_shape(lambda: kind.build(config, dtype=dtype, rngs=nnx.Rngs(0)))

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


@cache
def cpu_device() -> Any:
    """A jax.Device, or None where JAX_PLATFORMS names only others."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def slabs(block: Block, dtype: np.dtype) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The block as contiguous arrays of `dtype`, in order, each with its place in the parameter.

    Slabs are small because malloc keeps what is freed below its threshold (32 MB at most), in a heap per thread. A
    jax.Array on CPU turns a strided view at 1.5 GB/s a core, five times as fast as NumPy and as XLA's own transpose;
    NumPy casts as fast as XLA does, and compiles nothing.
    """
    rows = block.read()
    axis = 1 if rows.ndim > 1 and rows.shape[0] == 1 else 0
    start = block.start if axis == 0 else 0
    for part in np.array_split(rows, min(-(-rows.nbytes // SLAB_BYTES), rows.shape[axis]), axis=axis):
        turned = np.ascontiguousarray(part) if (cpu := cpu_device()) is None else np.asarray(jax.device_put(part, cpu))
        with np.errstate(over="ignore"):  # reported below, by name
            turned = turned.astype(dtype, copy=False)
        if must_be_finite(rows.dtype, dtype) and not np.isfinite(turned).all():
            raise overflow_error(block, dtype)
        index = slice(start, start := start + part.shape[axis])
        yield (slice(block.start, block.start + 1), index)[1 - axis :], turned


def on_host(leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    """The whole parameter, aligned so that a jax.Array on CPU can share its memory."""
    nbytes = int(np.prod(leaf.shape)) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    array = memory[-memory.ctypes.data % 64 :][:nbytes].view(dtype).reshape(leaf.shape)
    for block in leaf.blocks:
        for index, rows in slabs(block, dtype):
            array[index] = rows
    return array


@partial(jax.jit, donate_argnums=0, static_argnames=("axes", "check"))
def place(
    target: jax.Array, rows: jax.Array, start: jax.Array, *, axes: tuple[int, ...], check: bool
) -> tuple[jax.Array, jax.Array]:
    """`target` with `rows.transpose(axes)` from `start` on, in place; and whether they are finite, if to `check`."""
    rows = rows.transpose(axes).astype(target.dtype)
    finite = jnp.isfinite(rows).all() if check else jnp.array(True)
    return jax.lax.dynamic_update_slice_in_dim(target, rows, start, axis=0), finite


def on_accelerator(leaf: Leaf, dtype: np.dtype) -> jax.Array:
    """The whole parameter, filled block by block: the bytes go over as they lie in the file and turn there."""
    array = jnp.zeros(leaf.shape, dtype)
    check = must_be_finite(leaf.dtype, dtype)
    for block in leaf.blocks:
        rows = block.read()
        order = np.argsort([-stride for stride in rows.strides], kind="stable").tolist()
        axes = tuple(np.argsort(order).tolist())
        array, finite = place(
            array, jax.device_put(rows.transpose(order)), np.int32(block.start), axes=axes, check=check
        )
        if check and not finite:
            raise overflow_error(block, dtype)
        array.block_until_ready()  # else blocks pile up in memory faster than they are placed
    return array


def load_leaf(leaf: Leaf, dtype: np.dtype, *, on_device: bool) -> jax.Array | np.ndarray:
    """The parameter as one array."""
    if not on_device:
        return on_host(leaf, dtype)
    if jax.default_backend() == "cpu" or int(np.prod(leaf.shape)) * dtype.itemsize <= HOST_BYTES:
        return jax.device_put(on_host(leaf, dtype))
    return on_accelerator(leaf, dtype)


def check_pipeline(path: Path, pipeline_class: Any, classes: Mapping[str, str]) -> None:
    """Refuse pipelines and components of other classes, by name."""
    if not isinstance(pipeline_class, str) or pipeline_class not in PIPELINES:
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
            if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
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


def open_checkpoint(folder: str | PathLike[str]) -> Checkpoint:
    """Open a diffusers pipeline folder or one that `dfa2-convert` wrote; reads no weights yet.

    Raises:
        CheckpointError: the folder is neither, or is damaged, or holds another kind of pipeline.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, nor a hub id (owner/name), which dfa2-convert downloads.")
    if (folder / "model_index.json").exists():
        from convert import DiffusersCheckpoint

        return DiffusersCheckpoint(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds neither model_index.json (diffusers) nor config.json (dfa2-convert).")
    config = read_json(folder / "config.json")
    if name := config.get("_class_name"):
        raise CheckpointError(f"{folder} is a single {name!r:.200}; give the pipeline folder that holds it.")
    return ConvertedCheckpoint(folder)
