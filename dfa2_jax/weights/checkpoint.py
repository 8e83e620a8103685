"""Opened checkpoints: what a diffusers folder and a converted one have in common, and loading either into a model."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dfa2_jax.io.digest import digest_of
from dfa2_jax.io.errors import CheckpointError, blame, check_fields
from dfa2_jax.weights.dtypes import FLOAT_DTYPES, Precision, as_precision
from dfa2_jax.weights.leaf import Leaf, load_leaf
from dfa2_jax.weights.lora import Adapter, adapted, adapted_digest
from dfa2_jax.weights.quantized import Place, Stacked, quantized_leaves
from dfa2_jax.weights.room import Places, check_room
from dfa2_jax.weights.spec import REQUIRED, ComponentSpec, ParameterPath, PipelineSpec, class_names


def compute_dtype(spec: ComponentSpec, stored: DTypeLike, requested: DTypeLike | None, platform: str) -> np.dtype:
    """The dtype that a component is loaded in.

    Without a request it is the stored one, and float32 on CPU. Where float16 would overflow (T5, autoencoder) the
    component takes another dtype instead, asked for or not.

    Raises:
        CheckpointError: the dtype is none of `FLOAT_DTYPES`.
    """
    try:
        dtype = jnp.dtype(requested if requested is not None else "float32" if platform == "cpu" else stored)
    except TypeError as error:
        raise CheckpointError(f"dtype={requested!r} is not supported: use one of {sorted(FLOAT_DTYPES)}.") from error
    if dtype.name not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype={dtype.name} is not supported: use one of {sorted(FLOAT_DTYPES)}.")
    return jnp.dtype(spec.float16_becomes or dtype) if dtype == jnp.float16 else dtype


class Checkpoint(ABC):
    """A pipeline's weights and configs, in whichever of the two folder formats.

    Attributes:
        classes: of each component that the folder has, the scheduler among them.
        configs: each component's config.json, parsed.
        adapters: LoRAs that components are loaded with.
    """

    adapters: tuple[Adapter, ...] = ()

    def __init__(self, folder: Path, spec: PipelineSpec, classes: Mapping[str, str], configs: Mapping[str, Any]):
        self.folder = folder
        self.spec = spec
        self.classes = dict(classes)
        self.configs = dict(configs)

    @property
    def pipeline_class(self) -> str:
        return self.spec.pipeline_class

    @property
    def precision(self) -> Precision | None:
        """What the transformer's blocks are stored for, one of `PRECISIONS`; None: their own dtype."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal sha256 that names the transformer's source weights; both formats and all dtypes agree."""

    @cached_property
    def folder_digest(self) -> str:
        """A digest of all that images depend on, told without reading it: sizes of files and when they were written."""
        parts = [*(self.folder / name for name in self.classes), *self.folder.glob("tokenizer*")]
        stats = {path: path.stat() for part in parts for path in part.rglob("*") if path.is_file()}
        names = {str(path.relative_to(self.folder)): stat for path, stat in stats.items()}
        return digest_of({name: [stat.st_size, stat.st_mtime_ns] for name, stat in names.items()})

    @property
    def adapted_fingerprint(self) -> str:
        """The fingerprint of weights and LoRAs."""
        return adapted_digest(self.fingerprint, self.adapters)

    @property
    def adapted_folder_digest(self) -> str:
        """The digest of the folder and of LoRAs."""
        return adapted_digest(self.folder_digest, self.adapters)

    @abstractmethod
    def stored_dtype(self, component: str) -> np.dtype:
        """The dtype of the component's weights as stored (of most of them, where they differ), quantised ones aside."""

    @abstractmethod
    def leaves(self, component: str) -> dict[ParameterPath, Leaf]:
        """Every parameter of the component by its path in the model, all shapes checked."""

    def check_component(self, component: str) -> None:
        if component not in self.classes:
            raise CheckpointError(f"{self.folder} has no component '{component}'; it has {sorted(self.classes)}.")

    def tokenizer_folder(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_dir():
            raise CheckpointError(f"{path} is missing: the pipeline cannot read prompts without this tokenizer.")
        return path

    def check_scheduler(self) -> None:
        """A scheduler_config.json that is of no use is seen before any weight is."""
        with blame(f"The scheduler in {self.folder} has an unusable scheduler_config.json"):
            self.spec.check_scheduler(self.configs["scheduler"])

    def config(self, component: str) -> Any:
        """The component's config.json as the model's own type, every field of the type that it declares."""
        self.check_component(component)
        with blame(f"The {component} in {self.folder} has an unusable config.json"):
            config = self.spec.components[component].config(self.configs[component])
            check_fields(config)
            return config

    def abstract(self, component: str, dtype: DTypeLike) -> nnx.Module:
        """The component's model with shapes in place of arrays."""
        config, build = self.config(component), self.spec.components[component].build
        with blame(f"The {component} in {self.folder} has an unusable config.json"):
            model = nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=nnx.Rngs(0)))
        if component == "transformer" and self.precision is not None:
            self.quantize(component, model, self.precision)
        return model

    def quantize(
        self, component: str, model: nnx.Module, precision: Precision
    ) -> dict[ParameterPath, tuple[ParameterPath, ...]]:
        """As `spec.Quantize`.

        Raises:
            CheckpointError: this kind of model has no blocks of 8 bits.
        """
        spec = self.spec.components[component]
        if spec.quantize is None:
            raise CheckpointError(f"{spec.class_name} has no blocks in {precision}: use one of {sorted(FLOAT_DTYPES)}.")
        return spec.quantize(model, precision)

    def model_and_leaves(
        self, component: str, dtype: DTypeLike, precision: Precision | None
    ) -> tuple[nnx.Module, dict[ParameterPath, Leaf]]:
        """The component's model with shapes in place of arrays, and what fills them.

        Args:
            dtype: of what is not quantised.
            precision: to quantise blocks to that are not yet.
        """
        model, leaves, _ = self._made(component, dtype, precision)
        return model, leaves

    def _made(
        self, component: str, dtype: DTypeLike, precision: Precision | None
    ) -> tuple[nnx.Module, dict[ParameterPath, Leaf], dict[ParameterPath, tuple[ParameterPath, ...]]]:
        """As `model_and_leaves`, and by the path of each quantised array what it is made of."""
        model, leaves = self.abstract(component, dtype), self.leaves(component)
        if precision is None or (component == "transformer" and self.precision is not None):
            return model, adapted(leaves, self.adapters, component, dtype), {}
        leaves, made = adapted(leaves, self.adapters, component, None), self.quantize(component, model, precision)
        return model, quantized_leaves(leaves, made, model), made

    def types_of(self, component: str, dtype: Any) -> tuple[np.dtype, Precision | None]:
        """What a component is loaded in that is asked for in `dtype`, and what its blocks are quantised to.

        Raises:
            CheckpointError: it is stored in another precision.
        """
        self.check_component(component)
        spec, stored, platform = self.spec.components[component], self.stored_dtype(component), jax.default_backend()
        precision = as_precision(dtype)
        dtype = None if precision else dtype
        if component == "transformer":
            if self.precision is not None and (precision or dtype) not in (None, self.precision):
                raise CheckpointError(
                    f"{self.folder} has a transformer in {self.precision}, not in {precision or dtype}: leave dtype "
                    "out, or convert the source again."
                )
            if (precision or self.precision) and platform != "cpu" and stored == jnp.float32:
                dtype = jnp.bfloat16  # the kernel gives no float32
        return compute_dtype(spec, stored, dtype, platform), precision

    def load(self, component: str, dtype: Any = None, places: Places | None = None) -> nnx.Module:
        """The component's model with its weights on the default device.

        Args:
            dtype: as in `compute_dtype`, or one of `PRECISIONS`.
            places: where weights lie; each is put there before the next is read.

        Raises:
            CheckpointError: weights are missing, unknown or misshapen, or not finite, or of another precision.
            MemoryError: they do not fit; none was read then.
        """
        model, leaves = self.model_and_leaves(component, *self.types_of(component, dtype))
        check_room(component, model, places)
        graph, state = nnx.split(model)
        filled = []
        for path, variable in nnx.to_flat_state(state):
            if isinstance(variable, Place):
                numbers = jnp.arange(variable.shape[0], dtype=variable.dtype)
                filled.append((path, variable.replace(places.put_weight(numbers) if places else numbers)))
            else:
                filled.append((path, read_variable(path, variable, leaves, places)))
        return nnx.merge(graph, nnx.from_flat_state(filled))

    def read_again(
        self,
        component: str,
        variables: dict[ParameterPath, nnx.Variable],
        names: Collection[str],
        dtype: Any = None,
        places: Places | None = None,
    ) -> None:
        """Reads some of a loaded component's parameters again, as the checkpoint's LoRAs now are.

        Args:
            variables: all of the component's. Each is let go before its new array is read, so that both need not fit.
            names: of the plain model's parameters, dotted; what is quantised is read where it is made of one of them.
            dtype, places: as in `load`.

        Raises:
            CheckpointError: as `load`. Variables are then partly as they were.
        """
        _, leaves, made = self._made(component, *self.types_of(component, dtype))
        for path in [path for path in variables if path in leaves]:
            if {".".join(map(str, source)) for source in made.get(path, (path,))} & {*names}:
                old = variables[path]
                shape = jax.ShapeDtypeStruct(old.shape, old.dtype)
                variables[path] = old.replace(shape)
                del old
                variables[path] = read_variable(path, variables[path], leaves, places)


def read_variable(
    path: ParameterPath, variable: nnx.Variable, leaves: Mapping[ParameterPath, Leaf], places: Places | None
) -> nnx.Variable:
    """The variable with its array, on the device.

    Raises:
        CheckpointError: values are not finite, or scales not positive.
    """
    # Only trainable parameters live on the device: SD3's position table (452 MB) is cropped on the host.
    on_device = isinstance(variable, nnx.Param)
    array = load_leaf(leaves[path], variable.dtype, on_device=on_device)
    if isinstance(variable, Stacked) and path[-1] == "scale" and not (array > 0).all():
        raise CheckpointError(f"{leaves[path].blocks[0].source} holds scales that are not positive.")
    return variable.replace(places.put_weight(array) if places and on_device else array)


def check_pipeline(
    path: Path, pipeline_class: Any, classes: Mapping[str, str], specs: Mapping[str, PipelineSpec]
) -> PipelineSpec:
    """The spec of a folder's pipeline; refuses pipelines and components of other classes, by name."""
    if not isinstance(pipeline_class, str) or pipeline_class not in specs:
        raise CheckpointError(f"{path} is of a {pipeline_class!r:.200}; supported are {sorted(specs)}.")
    spec = specs[pipeline_class]
    for component, known in class_names(spec).items():
        named, wanted = classes.get(component), " or ".join(known)
        if named is None and component in REQUIRED:
            raise CheckpointError(f"{path} names no {component}: a {pipeline_class} needs {wanted}.")
        if named is not None and named not in known:
            raise CheckpointError(f"{path} has {component}={named!r:.200}; a {pipeline_class} needs {wanted}.")
    return spec
