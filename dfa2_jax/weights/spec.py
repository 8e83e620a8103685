"""What a reader of weights must know of a pipeline: handed in by `families.registry`, so that it imports no model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flax import nnx

from dfa2_jax.weights.dtypes import Precision
from dfa2_jax.weights.rules import Place, Rule, same_place
from dfa2_jax.weights.safetensors import Library

ParameterPath = tuple[Any, ...]
"""Where a parameter is in its model."""

Quantize = Callable[[nnx.Module, Precision], dict[ParameterPath, tuple[ParameterPath, ...]]]
"""Changes a model, and returns what each new array is made of, by their paths."""


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """One network of a pipeline.

    class_name: what model_index.json calls it.
    config: its config.json, parsed, as the model's own type.
    build: `build(config, dtype=..., rngs=...)`.
    rules: from the keys of its torch state dict to our parameters.
    lora_rules: of names that only LoRAs have.
    place: where a block's parameters lie: `place(config)(path, block)` is the path and the place in its leading axis.
        A block without a place is not read.
    library: whose rules say which weight files of its folder are read.
    float16_becomes: the dtype that the network takes where float16 would overflow; None: float16 is fine.
    quantize: gives an abstract model's blocks weights of 8 bits (`nn.quantize`); None: it has none to give.
    """

    class_name: str
    config: Callable[[Mapping[str, Any]], Any]
    build: Callable[..., nnx.Module]
    rules: Sequence[Rule]
    lora_rules: Sequence[Rule] = ()
    place: Callable[[Any], Place] = lambda config: same_place
    library: Library = "diffusers"
    float16_becomes: str | None = None
    quantize: Quantize | None = None


@runtime_checkable
class PipelineSpec(Protocol):
    """What a folder of one kind of pipeline holds. Every component but `required` ones may be absent."""

    pipeline_class: str
    scheduler_classes: tuple[str, ...]
    components: Mapping[str, ComponentSpec]

    def check_scheduler(self, config: Mapping[str, Any], /) -> None:
        """Raises ValueError where a scheduler_config.json asks for what is not implemented."""
        ...


REQUIRED = ("transformer", "scheduler")


def class_names(spec: PipelineSpec) -> dict[str, tuple[str, ...]]:
    """The classes that each component may have, the scheduler among them."""
    networks = {name: (component.class_name,) for name, component in spec.components.items()}
    return networks | {"scheduler": spec.scheduler_classes}
