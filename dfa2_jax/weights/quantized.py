"""Weights of 8 bits, made of a plain checkpoint's as they are read: a layer at a time."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from dfa2_jax.weights.leaf import Block, Leaf, not_finite_error
from dfa2_jax.weights.spec import ParameterPath
from pallas_kernels.passes import quantized_rows


class Stacked(nnx.Param):
    """A parameter that a scan over layers keeps whole. Whoever reads it takes its layer where it lies."""


class Place(nnx.Variable):
    """A layer's place in its stack, int32: 0, 1, 2 and so on."""


def quantized_leaves(
    leaves: Mapping[ParameterPath, Leaf], made: Mapping[ParameterPath, Sequence[ParameterPath]], model: nnx.Module
) -> dict[ParameterPath, Leaf]:
    """Those of a model with 8-bit weights.

    Args:
        leaves: of the plain model.
        made: as `nn.quantize.quantize` returns it, and the model that it changed.
    """
    dtypes = {path: variable.dtype for path, variable in nnx.to_flat_state(nnx.state(model))}
    used = {source for sources in made.values() for source in sources}
    result = {path: leaf for path, leaf in leaves.items() if path not in used}
    matrices: dict[ParameterPath, Matrices] = {}
    for path, sources in made.items():
        parts = [leaves[source] for source in sources]
        if path[-1] == "bias":
            result[path] = _joined(parts)
            continue
        if path[:-1] not in matrices:
            matrices[path[:-1]] = Matrices(parts, dtypes[(*path[:-1], "values")])
        result[path] = matrices[path[:-1]].leaf(path[-1])
    return result


class Matrices:
    """Kernels [layers, D, E] of one input as one of 8 bits, [layers, sum of E, D], with a scale for each row.

    All is found in one reading. Scales and lengths are kept for those who ask later.
    """

    def __init__(self, parts: Sequence[Leaf], dtype: DTypeLike):
        self.parts, self.dtype = parts, jnp.dtype(dtype)
        layers, depth, _ = parts[0].shape
        self.shape = layers, sum(part.shape[2] for part in parts), depth
        self._kept: dict[tuple[str, int], np.ndarray] = {}

    def leaf(self, name: str) -> Leaf:
        """The "values", the "scale" or the "length"."""
        shape = {"values": self.shape, "scale": self.shape[:2], "length": self.shape[:1]}[name]
        blocks = [
            Block(block.source, block.start, partial(self._read, name, number))
            for number, block in enumerate(self.parts[0].blocks)
        ]
        return Leaf(shape, self.dtype if name == "values" else np.dtype("float32"), blocks)

    def _read(self, name: str, number: int) -> np.ndarray:
        if (name, number) in self._kept:
            return self._kept[name, number]
        blocks = [part.blocks[number] for part in self.parts]
        values, scale, length = map(np.asarray, _quantize([block.read() for block in blocks], dtype=self.dtype))
        if not np.isfinite(length).all():
            raise not_finite_error(next(block for block in blocks if not _is_finite(block)), np.dtype("float32"))
        self._kept[("scale", number)], self._kept[("length", number)] = scale, length
        return values if name == "values" else self._kept[name, number]


def _is_finite(block: Block) -> bool:
    return bool(np.isfinite(np.asarray(block.read(), np.float32)).all())


@partial(jax.jit, static_argnames="dtype")
def _quantize(
    kernels: list[Array], *, dtype: DTypeLike
) -> tuple[Num[Array, "layers E D"], Float[Array, "layers E"], Float[Array, " layers"]]:
    rows = jnp.concatenate(kernels, axis=2).swapaxes(1, 2).astype(jnp.float32)
    return *quantized_rows(rows, dtype), jnp.linalg.norm(rows, axis=2).max(axis=1)


def _joined(parts: Sequence[Leaf]) -> Leaf:
    """Biases [layers, E] of one input as one."""
    if len(parts) == 1:
        return parts[0]

    def read(number: int) -> np.ndarray:
        return np.concatenate([part.blocks[number].read() for part in parts], axis=1)

    first = parts[0].blocks
    blocks = [Block(block.source, block.start, partial(read, number)) for number, block in enumerate(first)]
    return Leaf((parts[0].shape[0], sum(part.shape[1] for part in parts)), parts[0].dtype, blocks)
