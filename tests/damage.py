"""A small model folder, and ways to damage it."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.errors import CheckpointError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
KEY = "x_embedder.bias"
"""The key of a tensor of FLUX's transformer."""


def copy_model(source, folder):
    """Transformer and scheduler only."""
    for name in ("transformer", "scheduler"):
        shutil.copytree(source / name, folder / name)
    index = json.loads((source / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({k: index[k] for k in ("_class_name", "transformer", "scheduler")})
    )
    return folder


def load(folder):
    return open_checkpoint(folder).load("transformer")


def refuses(folder, message):
    return pytest.raises(CheckpointError, match=message)


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
