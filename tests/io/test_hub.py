"""Hub ids are looked up in the user's cache, and nothing contacts a network."""

import os
import socket

import pytest
from huggingface_hub import constants

from dfa2_jax import CheckpointError, Pipeline
from dfa2_jax.io.hub import find_model, is_hub_id, model_name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache, in a folder that is the current one, without a network."""

    def refuse(*args):
        raise AssertionError("a network was contacted")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(hub, folder):
    """A repository owner/model in the cache, as huggingface_hub lays it."""
    repository = hub / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    snapshot = repository / "snapshots" / "c0ffee"
    os.symlink(folder, snapshot)
    return snapshot


def test_a_hub_id_opens_from_the_cache(hub, tiny_flux_schnell):
    snapshot = cached(hub, tiny_flux_schnell)
    assert find_model("owner/model") == snapshot and model_name(snapshot) == "model"
    assert Pipeline.from_pretrained("owner/model").folder == snapshot


def test_a_hub_id_that_is_not_cached_is_told_what_fetches_it(hub):
    with pytest.raises(CheckpointError) as told:
        find_model("black-forest-labs/FLUX.1-dev")
    for words in (
        f"no folder black-forest-labs/FLUX.1-dev here, and the cache {hub} holds no such model",
        "hf download black-forest-labs/FLUX.1-dev ",
        "dfa2-convert black-forest-labs/FLUX.1-dev FOLDER --download",
    ):
        assert words in str(told.value)


def test_a_part_of_a_repository_is_told(hub, tmp_path):
    (tmp_path / "part").mkdir()
    cached(hub, tmp_path / "part")
    with pytest.raises(CheckpointError, match="without its model_index.json. Fetch it: hf download owner/model"):
        find_model("owner/model")


def test_a_path_is_no_hub_id(hub, tmp_path):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    os.symlink("absent", tmp_path / "owner" / "dangling")
    for path in ("owner/model", "owner/dangling", "./other/model", "../flux", "a/b/c", "flux", "/flux/dev"):
        assert not is_hub_id(path) and str(find_model(path)) == os.path.normpath(path) or path.startswith("./")
    assert is_hub_id("other/model")
    assert model_name(tmp_path / "owner" / "model") == "model"


def test_a_single_file_is_told_which_folder_is_needed(hub, tmp_path):
    (tmp_path / "flux1-dev.safetensors").touch()
    with pytest.raises(CheckpointError, match="flux1-dev.safetensors is a single file.*model_index.json"):
        Pipeline.from_pretrained("flux1-dev.safetensors")
