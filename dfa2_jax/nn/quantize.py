"""Blocks whose products are of 8 bits: which of a transformer's weights that are, and what they are made of.

Projections and MLPs of the stacked blocks are quantised. Embedders and the last layers are not: they are a few rows'
work, and the whole image depends on them. Modulations have weights of 8 bits where blocks multiply in 8 bits. A product
of one row waits for its weights alone, and FLUX.1-dev's modulations are 6.5 of its 23.8 GB. They add 1 % to the
velocity's error. Where only weights are of 8 bits they would add 6 %, and stay.

Queries, keys and values of one input have one matrix. A product of 9,216 columns takes 0.88 of the time of three of
3,072 (docs: quantization).
"""

from collections.abc import Collection

import jax.numpy as jnp
from flax import nnx

from dfa2_jax.nn.linear import MLP, Linear
from dfa2_jax.nn.norms import AdaLN
from dfa2_jax.nn.streams import Projections
from dfa2_jax.nn.weights import Plain, Quantized
from dfa2_jax.weights.quantized import Stacked
from dfa2_jax.weights.spec import ParameterPath

FLOAT8 = {"float8": ("down",)}
"""By precision, the layers that multiply in float8. All others do in int8.

Images of the model in the box keep 42.4 dB so, 43.6 all in int8, 48.4 in bfloat16. (All in float8 keep 6 dB less.)
After a GELU values differ much in size, and the product before can write them in float8 at once (docs: quantization).
"""


def quantize(
    model: nnx.Module, precision: str, *, kept: Collection[str] = ()
) -> dict[ParameterPath, tuple[ParameterPath, ...]]:
    """Give an abstract model's blocks weights of 8 bits, in place.

    Args:
        kept: parts of the model that keep theirs.

    Returns:
        By the path of each new array, the paths of those that it is made of. `weight.values`, `.scale` and
        `.length` are of the same ones.
    """
    made: dict[ParameterPath, tuple[ParameterPath, ...]] = {}
    for path, module in list(nnx.iter_modules(model)):
        if path and path[0] in kept:
            continue
        if isinstance(module, Projections) and _stacked(module.to_q):
            linears = {name: getattr(module, name) for name in ("to_q", "to_k", "to_v")}
            made |= _replace(module, "to_qkv", path, linears, precision)
            for name in linears:
                delattr(module, name)
            if module.to_out is not None:
                made |= _replace(module, "to_out", path, {"to_out": module.to_out}, precision)
        if isinstance(module, AdaLN) and _stacked(module.linear) and precision != "int8_weights":
            made |= _replace(module, "linear", path, {"linear": module.linear}, "int8_weights")
        if isinstance(module, MLP) and _stacked(module.up):
            for name in ("up", "down"):
                made |= _replace(module, name, path, {name: getattr(module, name)}, precision)
    return made


def quantize_linears(model: nnx.Module, precision: str) -> dict[ParameterPath, tuple[ParameterPath, ...]]:
    """As `quantize`, of every stacked linear layer for itself: a text encoder's."""
    made: dict[ParameterPath, tuple[ParameterPath, ...]] = {}
    for path, module in list(nnx.iter_modules(model)):
        for name, linear in vars(module).items():
            if isinstance(linear, Linear) and _stacked(linear):
                made |= _replace(module, name, path, {name: linear}, precision)
    return made


def _stacked(linear: Linear) -> bool:
    return isinstance(linear.weight, Plain) and linear.weight.kernel.ndim == 3


def _replace(
    module: nnx.Module, name: str, path: ParameterPath, linears: dict[str, Linear], precision: str
) -> dict[ParameterPath, tuple[ParameterPath, ...]]:
    """One layer `name` of the module in place of some of one input."""
    kernels = [linear.weight.kernel for linear in linears.values() if isinstance(linear.weight, Plain)]
    layers, depth, _ = kernels[0].shape
    columns = sum(kernel.shape[2] for kernel in kernels)
    (first, *_) = linears.values()
    with_abstract_arrays = nnx.eval_shape(
        lambda: Quantized(
            layers,
            depth,
            columns,
            dtype=jnp.float8_e4m3fn if name in FLOAT8.get(precision, ()) else jnp.int8,
            out_dtype=kernels[0].dtype,
            weights_alone=precision == "int8_weights",
        )
    )
    made = {
        (*path, name, "weight", part): tuple((*path, source, "weight", "kernel") for source in linears)
        for part in ("values", "scale", "length")
    }
    first.weight = with_abstract_arrays
    if first.bias is not None:
        first.bias = nnx.eval_shape(lambda dtype=first.bias.dtype: Stacked(jnp.zeros((layers, columns), dtype)))
        made[(*path, name, "bias")] = tuple((*path, source, "bias") for source in linears)
    setattr(module, name, first)
    return made
