"""LoRA files: changes of matrices, each the product of two thin ones, and how a checkpoint's parameters take them up.

A module X of a file changes the checkpoint's `X.weight` by `alpha / rank * up @ down`. So its place in our parameters
follows from the rules of the weights themselves (`weights.rules`). Trainers spell X in three ways. A dotted name is
diffusers' or that of the original model. kohya's names are dotted ones with underscores, and `lora_unet_` before them.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dfa2_jax.io.digest import digest_of
from dfa2_jax.io.errors import CheckpointError, raise_faults
from dfa2_jax.weights.leaf import Block, Leaf, is_finite
from dfa2_jax.weights.rules import Piece
from dfa2_jax.weights.safetensors import Tensor, open_safetensors

PARTS = {
    "down": re.compile(r"(.+?)\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|down)(?:\.default)?\.weight"),
    "up": re.compile(r"(.+?)\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up|up)(?:\.default)?\.weight"),
    "alpha": re.compile(r"(.+?)\.alpha"),
}
"""What a key says of which module."""

REFUSED = {
    "a LoKr, a Kronecker product": r"\.lokr_[wt]",
    "a LoHa, a Hadamard product": r"\.hada_[wt]",
    "a DoRA, which scales columns anew": r"dora_scale|lora_magnitude_vector",
    "an OFT, which turns weights": r"\.oft_",
    "a control LoRA of Black Forest Labs": r"(query|key)_norm\.scale|\.norm_(added_)?[qk]\.weight",
    "a LoRA with whole differences": r"\.diff(_b)?$",
    "a LoRA with biases": r"lora_(B|up)(\.default)?\.bias",
    "a LoRA of three factors": r"lora_mid",
}
"""Kinds of files that change weights otherwise, and a part of a key that shows each."""

MODELS = {
    "Stable Diffusion XL": r"(input|output)_blocks[_.]\d|middle_block[_.]\d|"
    r"(down|up)_blocks[_.]\d+[_.]attentions[_.]\d+[_.]transformer_blocks[_.][1-9]",
    "Stable Diffusion 1 or 2": r"(down|up)_blocks[_.]\d|mid_block[_.]",
    "Wan": r"blocks[_.]\d+[_.](self|cross)_attn",
    "Qwen-Image": r"(img|txt)_mod[_.]1|(img|txt)_mlp[_.]net",
    "Z-Image": r"layers[_.]\d+[_.](attention|feed_forward)[_.]",
    "FLUX.2": r"(double|single)_stream_modulation|to_qkv_mlp_proj",
    "HunyuanVideo": r"token_refiner|double_blocks\.\d+\.(img|txt)_attn_qkv",
    "FLUX.1": r"double_blocks|single_blocks|single_transformer_blocks",
    "Stable Diffusion 3": r"joint_blocks|transformer_blocks[_.]\d+[_.]attn2[_.]",
    "CogVideoX": r"transformer_blocks[_.]\d+[_.]attn1[_.]",
}
"""Models, and a part of a key that only LoRAs for them have; the first that is there names the file."""

READABLE = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class LowRank:
    """The change of one matrix, in place of a tensor of the checkpoint.

    key: of what it changes, in the file's spelling.
    """

    key: str
    up: Tensor
    down: Tensor
    factor: float
    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def source(self) -> str:
        return f"{self.up.file}: {self.key}"

    def array(self) -> Float[np.ndarray, "..."]:
        up, down = (np.asarray(x.array(), np.float32) for x in (self.up, self.down))
        product = (self.factor * up.reshape(up.shape[:2])) @ down.reshape(down.shape[0], -1)
        return product.reshape(self.shape)

    def faults(self) -> dict[str, str]:
        """What is wrong with the two factors, by the kind of fault."""
        shapes = f"{self.key} has factors {list(self.up.shape)} and {list(self.down.shape)}"
        if unreadable := sorted({self.up.dtype, self.down.dtype} - {*READABLE}):
            return {"types that no LoRA has": f"{self.key} is {', '.join(unreadable)}"}
        is_product = min(len(self.up.shape), len(self.down.shape)) >= 2 and self.up.shape[1] == self.down.shape[0]
        if not is_product or math.prod(self.up.shape[2:]) != 1 or not self.down.shape[0]:
            return {"factors of unequal rank": shapes}
        values = all(is_finite(np.ascontiguousarray(x.array())) for x in (self.up, self.down))
        if not values or not math.isfinite(self.factor):
            return {"values that are not finite": self.key}
        return {}


@dataclass(frozen=True)
class Adapter:
    """A LoRA as a checkpoint takes it up.

    digest: hexadecimal sha256 of the file.
    pieces: by component, what it adds to which parameters.
    """

    name: str
    file: Path
    scale: float
    digest: str
    pieces: Mapping[str, Sequence[Piece]]

    def content(self) -> dict[str, Any]:
        """As metadata have it."""
        return {"name": self.name, "file": str(self.file.absolute()), "scale": self.scale, "sha256": self.digest}


def read_modules(file: Path) -> dict[str, LowRank]:
    """The modules that a file changes, by their names in the file.

    Raises:
        CheckpointError: the file is none of safetensors, holds no LoRA, or one of another kind or with faults.
    """
    if file.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(f"{file}: pickle is never read. Use the LoRA's .safetensors file.")
    tensors = open_safetensors(file)
    is_adapter = any(re.search(r"lora|\.(lokr|hada|oft)_", key) for key in tensors)
    for kind, pattern in REFUSED.items() if is_adapter else ():
        if keys := [key for key in tensors if re.search(pattern, key)]:
            headline = f"{file} is {kind}, which is not supported: use a plain LoRA"
            raise_faults(headline, {f"such keys, of {len(tensors)}": keys})
    parts: dict[str, dict[str, Tensor]] = {}
    unknown, twice = [], []
    for key, tensor in tensors.items():
        for part, pattern in PARTS.items():
            if match := pattern.fullmatch(key):
                if part in parts.setdefault(match[1], {}):
                    twice.append(key)
                parts[match[1]][part] = tensor
                break
        else:
            unknown.append(key)
    if not any("up" in module for module in parts.values()):
        raise CheckpointError(
            f"{file} holds no LoRA: none of its {len(tensors)} keys is of a factor, such as X.lora_A.weight. The first "
            f"is {next(iter(tensors), None)!r:.200}."
        )
    alone = [module for module, some in parts.items() if not {"up", "down"} <= {*some}]
    faults = {"unknown keys": unknown, "keys that say the same": twice, "modules without both factors": alone}
    raise_faults(f"{file} cannot be read as a LoRA", faults)
    alphas = published_alphas(file)
    return {
        module: LowRank(f"{module}.weight", some["up"], some["down"], factor_of(module, some, alphas))
        for module, some in parts.items()
    }


def factor_of(module: str, parts: Mapping[str, Tensor], alphas: Mapping[str, Any]) -> float:
    """alpha / rank: 1 where the file says nothing of alpha.

    Raises:
        CheckpointError: alpha is not one number.
    """
    rank = parts["down"].shape[0] if parts["down"].shape else 0
    if "alpha" in parts:
        alpha = parts["alpha"]
        if math.prod(alpha.shape) != 1:
            raise CheckpointError(f"{alpha.source} is {list(alpha.shape)}, not one number: save the LoRA again.")
        return float(np.asarray(alpha.array(), np.float64).reshape(())) / max(rank, 1)
    component, _, name = module.partition(".")
    said = {
        key.removeprefix(f"{component}."): value for key, value in alphas.items() if key.startswith(f"{component}.")
    }
    if "lora_alpha" not in said:
        return 1.0
    patterns = said.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.fullmatch(rf"(.*\.)?({key})", name)), said["lora_alpha"])
    try:
        return float(alpha) / (math.sqrt(rank) if said.get("use_rslora") else max(rank, 1))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{parts['down'].file} has lora_alpha={alpha!r:.100} for {module:.200}.") from error


def published_alphas(file: Path) -> dict[str, Any]:
    """What PEFT's config says in the header of a file that diffusers 0.42 wrote (`LORA_ADAPTER_METADATA_KEY`).

    The header is sound JSON of strings: `open_safetensors` has read it.
    """
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    try:
        said = json.loads(header.get("__metadata__", {}).get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise CheckpointError(f"{file} has lora_adapter_metadata in its header that are no JSON object.")
    return said


def model_named(modules: Sequence[str]) -> str | None:
    """The model that a LoRA is for, by the names of its modules."""
    text = "\n".join(modules)
    return next((model for model, pattern in MODELS.items() if re.search(pattern, text)), None)


def adapted(
    leaves: Mapping[tuple[Any, ...], Leaf], adapters: Sequence[Adapter], component: str, dtype: Any
) -> dict[tuple[Any, ...], Leaf]:
    """A component's parameters with what LoRAs add, layer by layer as they are read: the sum is of float32.

    Args:
        dtype: that they are loaded in, kept where it is wider than the stored one; None: the stored one.
    """
    changes: dict[str, list[tuple[float, Piece]]] = {}
    for adapter in adapters:
        for piece in adapter.pieces.get(component, ()) if adapter.scale else ():
            changes.setdefault(piece.path, []).append((adapter.scale, piece))
    result = dict(leaves)
    for path, leaf in leaves.items():
        if some := changes.get(".".join(map(str, path))):
            is_wider = dtype is not None and jnp.finfo(dtype).bits > jnp.finfo(leaf.dtype).bits
            kept = np.dtype(dtype) if is_wider else leaf.dtype
            blocks = [Block(block.source, block.start, partial(_read, block, some, kept)) for block in leaf.blocks]
            result[path] = Leaf(leaf.shape, kept, blocks)
    return result


def _read(block: Block, changes: Sequence[tuple[float, Piece]], dtype: np.dtype) -> np.ndarray:
    rows = block.read()
    total = rows.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever loads the parameter looks for infinity and NaN
        for scale, piece in changes:
            if piece.place is None:
                total += scale * piece.rule.turn(piece.tensor.array())[block.start : block.start + len(rows)]
            elif 0 <= piece.place - block.start < len(rows):
                total[piece.place - block.start] += scale * piece.rule.turn(piece.tensor.array())
        return total.astype(dtype, copy=False)


def adapted_digest(digest: str, adapters: Sequence[Adapter]) -> str:
    """A digest of weights and of the LoRAs upon them, whatever their order; of none, the weights' own."""
    used = sorted((adapter.digest, adapter.scale) for adapter in adapters if adapter.scale)
    if not used:
        return digest
    return hashlib.sha256(digest_of([digest, used]).encode()).hexdigest()
