"""The networks as they train: the library's, with parameters to start from and operations whose gradients are fast."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dfa2_jax.families.registry import networks
from dfa2_jax.families.sd3.transformer import PositionTable
from toy import model
from toy.task import Configs, Task


def build(name: str, dtype: Any, configs: Configs = model.configs) -> nnx.Module:
    class_name, config = configs()[name]
    spec = networks()[class_name]
    module = spec.build(spec.config(config), dtype=dtype, rngs=nnx.Rngs(0))
    if class_name == "SD3Transformer2DModel":
        nnx.pop(module, PositionTable)
    return module


def graph_of(name: str, dtype: Any, configs: Configs = model.configs) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: build(name, dtype, configs)))[0]


def initial(name: str, seed: int, configs: Configs = model.configs) -> nnx.State:
    """Parameters to start from, drawn on the host, so that every device and version starts from the same."""
    random = np.random.default_rng([seed, *name.encode()])
    state = nnx.state(nnx.eval_shape(lambda: build(name, jnp.float32, configs)))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        spelled, shape = ".".join(map(str, path)), variable.shape
        value = first_value(name, spelled, shape, random).astype(np.float32)
        filled.append((path, variable.replace(value)))
    return nnx.from_flat_state(filled)


def first_value(network: str, path: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    kind = path.rpartition(".")[2]
    if kind in ("scale", "bias"):
        return np.full(shape, kind == "scale" or path.endswith("conv_y.bias"))  # it makes scales, of a spatial norm
    if kind != "kernel":  # tables of embeddings, of order one, as what is added to them
        return random.normal(size=shape) * (0.2 if kind == "position_embedding" else 0.5)
    if network == "transformer" and re.search(r"\.norm[12]?\.linear\.|^(norm_out|proj_out)\.", path):
        return np.zeros(shape)  # adaLN-Zero (arXiv 2212.09748)
    stacked = path.startswith(("segments", "layers", "transformer_blocks"))
    fan_in = math.prod(shape[stacked:-1])
    spread = fan_in**-0.5
    divisor = 4 if path.endswith("attention.q.weight.kernel") else 1  # T5's attention has no 1/sqrt of its own
    return random.normal(size=shape) * (spread / divisor)


class Lookup:
    """A table whose rows are looked up by a product, `table[...][ids]`, so that its gradient is one too.

    On an H100 steps took 5 microseconds for each token of text, 200 of 230 ms, with the gradient of a gather. That is a
    scatter in bfloat16, most of whose rows are padding and collide.
    """

    def __init__(self, table: jax.Array):
        self.table = table

    def __getitem__(self, ids: Any) -> Any:
        if ids is Ellipsis:
            return self
        return jax.nn.one_hot(ids, len(self.table), dtype=self.table.dtype) @ self.table


class Product(nnx.Module):
    """A convolution as one product of each pixel's neighbourhood, [B h w, size^2 C], with the kernel.

    These networks' convolutions are narrow (16 and 32 channels): XLA's take 20 times as long inside a scan on CPU.
    cuDNN's took 200 s of autotuning on an H100, or without it 290 ms a step of the autoencoder where these take 22.
    """

    def __init__(self, conv: nnx.Conv):
        self.kernel, self.bias = conv.kernel, conv.bias
        self.stride, self.padding = conv.strides, conv.padding

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, stride = self.kernel[...], self.stride
        size, batch = kernel.shape[0], x.shape[:-3]  # of a video, frames too
        x = jnp.pad(x.reshape(-1, *x.shape[-3:]), ((0, 0), *self.padding, (0, 0)))
        height, width = ((length - size) // stride + 1 for length in x.shape[1:3])
        ends = [(height - 1) * stride + 1, (width - 1) * stride + 1]
        near = [
            x[:, down : down + ends[0] : stride, across : across + ends[1] : stride]
            for down, across in np.ndindex(size, size)
        ]
        out = jnp.concatenate(near, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
        return (out + self.bias[...][None, None, None]).reshape(*batch, *out.shape[1:])


def convolve_by_products(module: nnx.Module) -> nnx.Module:
    """A video's convolutions in time stay as they are: tuned, cuDNN's take a third of the time of such products."""
    for _, layer in list(nnx.iter_modules(module)):
        for name, child in list(vars(layer).items()):
            if isinstance(child, nnx.Conv):
                setattr(layer, name, Product(child))
    return module


@dataclass(frozen=True)
class Setup:
    """All that is fixed while a program is traced."""

    task: Task
    dtype: Any
    attention: str
    mesh: Mesh | None
    warm_up: int
    """Steps in which the learning rate grows."""

    def merge(self, name: str, params: Any) -> Any:
        """The network with parameters in the dtype of the computation; gradients reach the float32 ones."""
        graph = graph_of(name, self.dtype, self.task.configs)
        module = nnx.merge(graph, jax.tree.map(lambda x: x.astype(self.dtype), params))
        return convolve_by_products(module)

    def spread(self, x: jax.Array) -> jax.Array:
        """The batch over all devices."""
        if self.mesh is None:
            return x
        spec = PartitionSpec("batch", *(None for _ in x.shape[1:]))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
