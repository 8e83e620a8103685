"""What a training left, as a complete diffusers folder in float16.

    python -m toy.export build/result dfa2_jax/demo/toy-sd35

Needs torch, diffusers and transformers (the `test` extra). Keys and layouts come from the tables that read such folders
(`ComponentSpec.rules`), backwards.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5TokenizerFast

from dfa2_jax.families.registry import networks
from dfa2_jax.io.atomic import replacing
from dfa2_jax.weights.rules import pieces_of
from dfa2_jax.weights.safetensors import Tensor
from toy import model
from toy.result import config, read_result


def source_array(
    key: str, shape: tuple[int, ...], name: str, kind: tuple[str, dict[str, Any]], arrays: dict[str, np.ndarray]
) -> np.ndarray:
    """What torch's parameter `key` of network `name` must hold so that our rules read our array from it."""
    class_name, fields = kind
    spec = networks()[class_name]
    tensor = Tensor(Path(name), key, "F32", shape, 0, 0, None)  # type: ignore[arg-type]
    pieces = pieces_of(key, tensor, spec.rules, spec.place(spec.config(fields)))
    if not pieces:
        raise KeyError(f"No rule of {class_name} fills anything from {key}.")
    places = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    filled = np.full(places.size, np.nan, np.float32)
    for piece in pieces:
        whole = arrays[f"{name}.{piece.path}"]
        wanted = whole if piece.place is None else whole[piece.place]
        turned = piece.rule.turn(places)
        if turned.shape != wanted.shape:
            raise ValueError(f"{key} turns into {turned.shape}, but {name}.{piece.path} is {wanted.shape}.")
        filled[turned.ravel()] = wanted.ravel()
    return filled.reshape(shape)


def make(class_name: str, fields: dict[str, Any]) -> torch.nn.Module:
    if hasattr(diffusers, class_name):
        return getattr(diffusers, class_name)(**fields)
    kind = T5Config if class_name == "T5EncoderModel" else CLIPTextConfig
    return getattr(transformers, class_name)(kind(**fields))


def network(name: str, kind: tuple[str, dict[str, Any]], arrays: dict[str, np.ndarray]) -> torch.nn.Module:
    """A component, of a class and a config, with our weights."""
    module = make(*kind).eval()
    filled = {}
    for key, value in module.state_dict().items():
        source = "shared.weight" if key == "encoder.embed_tokens.weight" else key  # tied
        filled[key] = torch.from_numpy(source_array(source, tuple(value.shape), name, kind, arrays))
    if bad := [key for key, value in filled.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{name}: parts of {bad} are not filled, or are not finite.")
    module.load_state_dict(filled)
    return module


def write_pipeline(pipeline: diffusers.DiffusionPipeline, folder: Path, dtype: torch.dtype) -> Path:
    """The folder that diffusers saves, file by file, so that no half of one is ever there."""
    if dtype != torch.float32:
        pipeline.to(dtype)
    with TemporaryDirectory() as temporary:
        pipeline.save_pretrained(temporary)
        for path in (path for path in Path(temporary).rglob("*") if path.is_file()):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as file:
                file.write(path.read_bytes())
    return folder


def export(result: Path, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    arrays = read_result(result)
    vocabulary, merges = model.clip_vocabulary()
    clip = {
        name: CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=model.CLIP_LENGTH)
        for name, pad in model.CLIP_PADDING.items()
    }
    kinds = {name: (class_name, config(name, arrays)) for name, (class_name, _) in model.configs().items()}
    pipeline = StableDiffusion3Pipeline(
        **{name: network(name, kind, arrays) for name, kind in kinds.items()},
        scheduler=FlowMatchEulerDiscreteScheduler(**model.SCHEDULER),
        **clip,
        tokenizer_3=T5TokenizerFast(vocab=model.t5_pieces(), model_max_length=512, extra_ids=0),
    )
    return write_pipeline(pipeline, folder, dtype)


def run(export: Callable[[Path, Path], Path], about: str | None) -> None:
    """The command line of an export: it prints the size of each file."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    export(args.result, args.folder)
    sizes = {str(path.relative_to(args.folder)): path.stat().st_size for path in sorted(args.folder.rglob("*.*"))}
    print(json.dumps(sizes | {"total": sum(sizes.values())}, indent=1))


if __name__ == "__main__":
    run(export, __doc__)
