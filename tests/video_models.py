"""Video networks of diffusers, as a pipeline would load them."""

import mmap
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dfa2_jax.vae.spec import VIDEO_AUTOENCODER
from dfa2_jax.weights.leaf import load_leaf
from dfa2_jax.weights.rules import map_weights
from dfa2_jax.weights.safetensors import Tensor, open_weights
from dfa2_jax.weights.spec import ComponentSpec


def shapes_of(
    config: Any, dtype: Any, spec: ComponentSpec = VIDEO_AUTOENCODER
) -> tuple[nnx.GraphDef, nnx.State, dict[str, Any]]:
    graph, state = nnx.split(nnx.eval_shape(lambda: spec.build(config, dtype=dtype, rngs=nnx.Rngs(0))))
    return graph, state, {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def loaded(reference: Any, dtype: Any = jnp.float32, spec: ComponentSpec = VIDEO_AUTOENCODER) -> Any:
    """From the folder that diffusers writes, by the rules that a pipeline loads it by."""
    config = spec.config(dict(reference.config))
    graph, state, variables = shapes_of(config, dtype, spec)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        shapes = {path: tuple(variable.shape) for path, variable in variables.items()}
        leaves = map_weights(open_weights(Path(folder)), spec.rules, shapes, "tiny")
        for path, leaf in leaves.items():
            variables[path].set_value(load_leaf(leaf, np.dtype(dtype), on_device=True))
    return nnx.merge(graph, state)


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The files' tensors of a network, of whose values there are none."""
    no_bytes = mmap.mmap(-1, 1)
    return {
        key: Tensor(Path("meta"), key, "BF16", tuple(value.shape), 0, 0, no_bytes)
        for key, value in model.state_dict().items()
    }
