"""Hub ids: folders in the user's own cache of huggingface_hub. Nothing here contacts a network."""

import os
import re
from os import PathLike
from pathlib import Path

import huggingface_hub  # resolves its names lazily, too
from huggingface_hub import constants

from dfa2_jax.io.errors import CheckpointError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
CACHED = re.compile(r"models--[\w.-]+?--([\w.-]+)")


def is_hub_id(source: str | PathLike[str]) -> bool:
    """Whether a source names a repository: `owner/name`, and no such path is here."""
    return HUB_ID.fullmatch(os.fspath(source)) is not None and not os.path.lexists(source)


def find_model(source: str | PathLike[str]) -> Path:
    """The folder of a model: a path, or a hub id whose files lie in the user's cache.

    Raises:
        CheckpointError: the source is a single file, or a hub id that the cache lacks. The message names the command
            that fetches it.
    """
    path = Path(source)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a single file, and those are not read: give the pipeline's diffusers folder, which holds "
            "model_index.json and a folder for each of transformer, vae, text encoders and tokenizers."
        )
    return find_cached(os.fspath(source)) if is_hub_id(source) else path


def find_cached(repository: str) -> Path:
    """A repository's snapshot in the user's cache.

    Raises:
        CheckpointError: the cache lacks it, or holds a part without model_index.json.
    """
    fetch = (
        f"Fetch it: hf download {repository} --include '*.json' --include '*/*' "
        f"(or dfa2-convert {repository} FOLDER --download). Nothing is downloaded unasked."
    )
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    except Exception as error:  # of many types: absent, no valid id, a cache that cannot be read
        raise CheckpointError(
            f"There is no folder {repository} here, and the cache {constants.HF_HUB_CACHE} holds no such model. {fetch}"
        ) from error
    is_converted = (folder / "config.json").is_file() and (folder / "weights").is_dir()
    if not is_converted and not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{repository} is in the cache, {folder}, without its model_index.json. {fetch}")
    return folder


def links_end_in(folder: Path) -> Path:
    """The folder that links of a model's files may lead into: the model's own, all links of it followed.

    In the hub's cache it is the repository's: the files of a snapshot are links to blobs beside `snapshots`.
    """
    real = folder.resolve()
    for snapshot in (real, *real.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and CACHED.fullmatch(repository.name):
            return repository
    return real


def model_name(folder: Path) -> str:
    """What people call a model: the folder's name, or the repository's where the folder is a snapshot of the cache."""
    cached = CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return folder.name if cached is None else cached[1]
