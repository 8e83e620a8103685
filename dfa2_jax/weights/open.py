"""Opens a folder in either format."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from dfa2_jax.io.errors import CheckpointError, read_json
from dfa2_jax.weights.checkpoint import Checkpoint
from dfa2_jax.weights.diffusers import DiffusersCheckpoint
from dfa2_jax.weights.orbax import ConvertedCheckpoint
from dfa2_jax.weights.spec import PipelineSpec


def open_folder(folder: str | PathLike[str], specs: Mapping[str, PipelineSpec], *, verify: bool = True) -> Checkpoint:
    """Open a diffusers pipeline folder or one that `dfa2-convert` wrote; reads no weights yet.

    Args:
        specs: of the pipelines that are known, by class name: `families.registry.FAMILIES`.
        verify: compare a converted folder with its checksums while it is read.

    Raises:
        CheckpointError: the folder is neither, or is damaged, or holds another kind of pipeline.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, nor the hub id (owner/name) of one.")
    if (folder / "model_index.json").exists():
        return DiffusersCheckpoint(folder, specs)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds neither model_index.json (diffusers) nor config.json (dfa2-convert).")
    config = read_json(folder / "config.json")
    if name := config.get("_class_name"):
        raise CheckpointError(f"{folder} is a single {name!r:.200}; give the pipeline folder that holds it.")
    return ConvertedCheckpoint(folder, specs, verify)
