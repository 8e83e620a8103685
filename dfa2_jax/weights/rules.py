"""How the keys of torch state dicts map onto our parameters: tables of rules, each key used once, each place filled.

A rule is a regular expression over a whole key, the path of the parameter, and how the array turns. A group named
`layer` is the number of a block: equal blocks are stacked, so block 3 fills place 3 of its parameter.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from dfa2_jax.io.errors import raise_faults
from dfa2_jax.weights.leaf import Block, Leaf
from dfa2_jax.weights.safetensors import DTYPES

Turn = Callable[[np.ndarray], np.ndarray]


@runtime_checkable
class Source(Protocol):
    """What fills parameters: a tensor of a file (`safetensors.Tensor`), or what is made of some (`lora.LowRank`).

    dtype: one of safetensors' names.
    source: names file and key.
    """

    @property
    def key(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def source(self) -> str: ...

    def array(self) -> np.ndarray: ...


Place = Callable[[str, int], tuple[str, int] | None]
"""`(path, block)` to the parameter's path and the block's place in its leading axis; None: the block is left out.

Raises ValueError where the model has no such block.
"""


def same_place(path: str, block: int) -> tuple[str, int]:
    return path, block


def same(x: np.ndarray) -> np.ndarray:
    return x


def linear(x: np.ndarray) -> np.ndarray:
    """torch's [out, in] as [in, out]: a view, turned by whoever copies it."""
    return x.T


def conv(x: np.ndarray) -> np.ndarray:
    """torch's [out, in, height, width] as [height, width, in, out]."""
    return x.transpose(2, 3, 1, 0)


def video_conv(x: np.ndarray) -> np.ndarray:
    """torch's [out, in, frames, height, width] as [frames, height, width, in, out]."""
    return x.transpose(2, 3, 4, 1, 0)


def table(x: np.ndarray) -> np.ndarray:
    """[1, cells, D] as [cells, D]."""
    return x.squeeze(0)


@dataclass(frozen=True)
class Rule:
    """Source keys that fullmatch `key` fill `target`; None: a known key that is left out.

    is_spare: it fills its place only where no other key does.
    """

    key: str
    target: str | None
    turn: Turn = same
    is_spare: bool = False


def dense(key: str, target: str) -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{target}.weight.kernel", linear), Rule(rf"{key}\.bias", f"{target}.bias")]


def norm(key: str, target: str) -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{target}.scale"), Rule(rf"{key}\.bias", f"{target}.bias")]


def conv2d(key: str, target: str) -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{target}.kernel", conv), Rule(rf"{key}\.bias", f"{target}.bias")]


def conv3d(key: str, target: str) -> list[Rule]:
    return [Rule(rf"{key}\.weight", f"{target}.kernel", video_conv), Rule(rf"{key}\.bias", f"{target}.bias")]


@dataclass(frozen=True)
class Piece:
    """What fills a parameter, or one place of its leading axis."""

    path: str
    place: int | None
    tensor: Source
    rule: Rule


def pieces_of(key: str, tensor: Source, rules: Sequence[Rule], place: Place) -> list[Piece] | None:
    """Where a key's tensor goes; None if no rule knows the key."""
    pieces, known = [], False
    for rule in rules:
        if match := re.fullmatch(rule.key, key):
            known = True
            if rule.target is None:
                continue
            path, block = match.expand(rule.target), match.groupdict().get("layer")
            target = (path, None) if block is None else place(path, int(block))
            if target is not None:
                pieces.append(Piece(*target, tensor, rule))
    return pieces if known else None


def map_weights(
    tensors: Mapping[str, Source],
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    headline: str,
    *,
    place: Place = same_place,
) -> dict[str, Leaf]:
    """Every parameter's leaf, filled from the tensors: each key used once, each place filled once, all shapes equal.

    Args:
        shapes: of the parameters, by dotted path; stacked ones with their leading layer axis.
        headline: names the folder, in front of the faults.

    Raises:
        CheckpointError: all faults together.
    """
    pieces_by_path: dict[str, dict[int | None, Piece]] = {}
    unknown, duplicate, wrong = [], [], []
    for key, tensor in tensors.items():
        try:
            pieces = pieces_of(key, tensor, rules, place)
        except ValueError:  # a block beyond the last
            pieces = None
        if pieces is None or any(piece.path not in shapes for piece in pieces):
            unknown.append(key)
            continue
        for piece in pieces:
            taken = pieces_by_path.setdefault(piece.path, {})
            other = taken.get(piece.place)
            if other is not None and other.rule.is_spare == piece.rule.is_spare:
                duplicate.append(f"{key} and {other.tensor.key}")
            if other is None or not piece.rule.is_spare:
                taken[piece.place] = piece

    leaves, missing = {}, []
    for path, shape in shapes.items():
        filled = pieces_by_path.get(path, {})
        stacked = None not in filled and bool(filled)
        wanted: list[int | None] = list(range(shape[0])) if stacked else [None]
        missing += [path if index is None else f"{path}, layer {index}" for index in wanted if index not in filled]
        unknown += [piece.tensor.key for index, piece in filled.items() if index not in wanted]
        expected = shape[1:] if stacked else shape
        for index in wanted:
            if index in filled and (fault := shape_fault(filled[index], expected)):
                wrong.append(fault)
        leaves[path] = (shape, [filled[index] for index in wanted if index in filled])
    raise_faults(
        headline,
        {"unknown keys": unknown, "missing parameters": missing, "duplicate keys": duplicate, "wrong shapes": wrong},
    )
    return {path: make_leaf(shape, pieces) for path, (shape, pieces) in leaves.items()}


def shape_fault(piece: Piece, expected: tuple[int, ...]) -> str | None:
    try:
        got = piece.rule.turn(np.broadcast_to(np.int8(0), piece.tensor.shape)).shape
    except (ValueError, IndexError):
        got = ()
    if got == expected:
        return None
    return f"{piece.tensor.key} is {list(piece.tensor.shape)}, which does not fill {piece.path} {list(expected)}"


BLOCK_BYTES = 2**26
"""Bytes of a block of rows, where a parameter is no stack of layers. T5-XXL's embeddings (263 MB) go in blocks, too."""


def make_leaf(shape: tuple[int, ...], pieces: list[Piece]) -> Leaf:
    dtype = DTYPES[pieces[0].tensor.dtype]
    if pieces[0].place is not None:
        blocks = [Block(piece.tensor.source, piece.place or 0, partial(read_layer, piece)) for piece in pieces]
    else:
        (piece,) = pieces
        rows = equal_blocks(shape, math.prod(shape) * dtype.itemsize)
        starts = range(0, shape[0], rows) if shape else [0]
        blocks = [Block(piece.tensor.source, start, partial(read_rows, piece, start, rows)) for start in starts]
    return Leaf(shape, dtype, blocks)


def equal_blocks(shape: tuple[int, ...], nbytes: int) -> int:
    """Rows of a block: equal blocks of at most `BLOCK_BYTES`, since a chunk of an array has one size."""
    fewest, rows = -(-nbytes // BLOCK_BYTES), shape[0] if shape else 1
    counts = [count for count in range(max(1, fewest), 4 * fewest + 1) if rows % count == 0]
    return rows // counts[0] if counts else max(1, rows)


def read_layer(piece: Piece) -> np.ndarray:
    return piece.rule.turn(piece.tensor.array())[None]


def read_rows(piece: Piece, start: int, rows: int) -> np.ndarray:
    return piece.rule.turn(piece.tensor.array())[start : start + rows]
