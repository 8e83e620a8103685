"""A diffusers folder as an opened checkpoint."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dfa2_jax.io.errors import CheckpointError, read_json
from dfa2_jax.weights.checkpoint import Checkpoint, check_pipeline
from dfa2_jax.weights.dtypes import FLOAT_DTYPES
from dfa2_jax.weights.leaf import Leaf
from dfa2_jax.weights.rules import map_weights
from dfa2_jax.weights.safetensors import DTYPES, Tensor, open_weights
from dfa2_jax.weights.spec import PipelineSpec, class_names

FINGERPRINT_BYTES = 4096
"""Bytes that are read of each end of each tensor. FLUX's 1,160 tensors take 9 MB so, and any fine-tuning shows."""


class DiffusersCheckpoint(Checkpoint):
    """A folder that diffusers' `save_pretrained` wrote: model_index.json, a folder per component."""

    def __init__(self, folder: Path, specs: Mapping[str, PipelineSpec]):
        path = folder / "model_index.json"
        index = read_json(path)
        classes, configs = {}, {}
        for name, entry in index.items():
            if name.startswith("_") or not isinstance(entry, list) or "tokenizer" in name:
                continue
            if len(entry) != 2 or not all(isinstance(part, str | None) for part in entry):
                raise CheckpointError(f"{path}: {name}={entry!r:.200} is not a pair of library and class.")
            if entry[1] is not None:
                classes[name] = entry[1]
        spec = check_pipeline(path, index.get("_class_name"), classes, specs)
        classes = {name: kind for name, kind in classes.items() if name in class_names(spec)}
        for name in classes:
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            configs[name] = read_json(folder / name / file)
            if explicit := configs[name].get("transformers_weights"):
                raise CheckpointError(
                    f"{folder / name / file} has transformers_weights={explicit!r:.200}, which is not supported: "
                    "rename that file to model.safetensors and remove the field."
                )
            if "quantization_config" in configs[name]:
                raise CheckpointError(
                    f"{folder / name / file} has a quantization_config: quantised weights are not supported; "
                    "use the float32, bfloat16 or float16 version of the model."
                )
        super().__init__(folder, spec, classes, configs)
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def tensors(self, component: str) -> dict[str, Tensor]:
        """The component's weights by source key, headers checked."""
        self.check_component(component)
        if component not in self._tensors:
            tensors = open_weights(self.folder / component, self.spec.components[component].library)
            for key, tensor in tensors.items():
                is_readable = DTYPES[tensor.dtype].name in (*FLOAT_DTYPES, "float64")  # scripts of merges leave some
                if not is_readable and "position_ids" not in key:
                    raise CheckpointError(
                        f"{tensor.source} is {tensor.dtype}: quantised weights are not supported; "
                        f"use the version of the model in one of {sorted(FLOAT_DTYPES)}."
                    )
            self._tensors[component] = tensors
        return self._tensors[component]

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        digest = hashlib.sha256()
        for key, tensor in sorted(self.tensors("transformer").items()):
            digest.update(f"{key} {list(tensor.shape)} {tensor.dtype} ".encode())
            raw = tensor.raw()
            digest.update(raw[:FINGERPRINT_BYTES].tobytes() + raw[-FINGERPRINT_BYTES:].tobytes())
        return digest.hexdigest()

    def stored_dtype(self, component: str) -> np.dtype:
        sizes: Counter[str] = Counter()
        for tensor in self.tensors(component).values():
            sizes[DTYPES[tensor.dtype].name] += tensor.end - tensor.begin
        floats = [name for name, _ in sizes.most_common() if name in FLOAT_DTYPES]
        return jnp.dtype(floats[0] if floats else "float32")

    def leaves(self, component: str) -> dict[tuple[Any, ...], Leaf]:
        tensors = self.tensors(component)
        state = nnx.to_flat_state(nnx.state(self.abstract(component, self.stored_dtype(component))))
        paths = {".".join(map(str, path)): path for path, _ in state}
        shapes = {".".join(map(str, path)): tuple(variable.shape) for path, variable in state}
        headline = f"The {component} in {self.folder} is not a {self.classes[component]} as its config.json says"
        spec = self.spec.components[component]
        leaves = map_weights(tensors, spec.rules, shapes, headline, place=spec.place(self.config(component)))
        return {paths[name]: leaf for name, leaf in leaves.items()}
