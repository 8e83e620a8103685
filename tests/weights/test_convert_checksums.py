"""What changes in a folder after it was written is seen when it is loaded, and named by `verify_folder`."""

import hashlib
import os
import re
import shutil

import pytest
from convert_cases import assert_equal_weights, edit_config
from huggingface_hub import constants

from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.families.registry import FAMILIES, open_checkpoint
from dfa2_jax.io.digest import file_sha256
from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.io.hub import find_model
from dfa2_jax.weights.open import open_folder
from dfa2_jax.weights.verify import verify_folder

ARRAY, OTHER = "layers.mlp.up.weight.kernel", "layers.mlp.down.weight.kernel"
"""Arrays of the smallest text encoder: it loads in no time."""


@pytest.fixture(scope="module")
def converted(tiny_flux_dev, tmp_path_factory):
    return convert_checkpoint(tiny_flux_dev, tmp_path_factory.mktemp("converted") / "flux-dev")


@pytest.fixture
def folder(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "folder")


def chunk(folder, array, place=1):
    return folder / "weights" / "text_encoder" / f"{array}.value" / f"{place}.0.0"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def exchange(folder):
    ours, theirs = chunk(folder, ARRAY), chunk(folder, OTHER)
    data = ours.read_bytes()
    ours.write_bytes(theirs.read_bytes())
    theirs.write_bytes(data)


def link_out(folder):
    path = chunk(folder, ARRAY)
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


DAMAGE = {
    "a flipped bit": (
        lambda folder: flip(chunk(folder, ARRAY)),
        [f"text_encoder.{ARRAY}, chunk 1.0.0, has changed since"],
    ),
    "a zeroed chunk": (
        lambda folder: chunk(folder, ARRAY).write_bytes(bytes(chunk(folder, ARRAY).stat().st_size)),
        [f"text_encoder.{ARRAY}, chunk 1.0.0, has changed since"],
    ),
    "two arrays exchanged": (
        exchange,
        [f"text_encoder.{ARRAY}, chunk 1.0.0, has changed", f"text_encoder.{OTHER}, chunk 1.0.0, has changed"],
    ),
    "a link out of the folder": (link_out, ["1.0.0, is a link out of the folder", "elsewhere"]),
    "a truncated chunk": (lambda folder: os.truncate(chunk(folder, ARRAY), 100), ["1.0.0, cannot be read: it has 100"]),
    "a missing chunk": (lambda folder: chunk(folder, ARRAY).unlink(), ["1.0.0, cannot be read: No such file"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights_are_not_loaded(case, folder):
    damage, messages = DAMAGE[case]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).load("text_encoder")
    assert any(message in str(caught.value) for message in messages)
    with pytest.raises(CheckpointError, match=r"changed since it was converted. Remove .*dfa2-convert") as caught:
        verify_folder(folder)
    assert all(message in str(caught.value) for message in messages)


def as_snapshot(folder, repository):
    """Laid as huggingface_hub lays a repository: files are links to blobs."""
    snapshot = repository / "snapshots" / "c0ffee"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(repository / "blobs" / str(number))
        link.symlink_to(os.path.relpath(repository / "blobs" / str(number), link.parent))
    return snapshot


def test_a_converted_folder_in_the_cache_of_the_hub_is_read(folder, tmp_path, converted, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = as_snapshot(folder, tmp_path / "hub" / "models--owner--model")
    (tmp_path / "hub" / "models--owner--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--model" / "refs" / "main").write_text("c0ffee")
    assert find_model("owner/model") == snapshot
    assert_equal_weights(open_checkpoint(snapshot), open_checkpoint(converted), "text_encoder")
    assert verify_folder(snapshot) == []
    link = chunk(snapshot, ARRAY)
    other = tmp_path / "hub" / "models--owner--other"
    other.mkdir()
    shutil.copy(link, other / "blob")
    link.unlink()
    link.symlink_to(other / "blob")  # the same bytes, of another repository
    with pytest.raises(CheckpointError, match=r"1.0.0, is a link out of the folder, to .*models--owner--other"):
        open_checkpoint(snapshot).load("text_encoder")


def test_links_to_blobs_are_for_the_cache_of_the_hub_alone(folder, tmp_path):
    snapshot = as_snapshot(folder, tmp_path / "owner--model")
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        open_checkpoint(snapshot).load("text_encoder")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(fingerprint="0" * 64),
        lambda config: config["components"]["scheduler"]["config"].update(shift=1.5),
        lambda config: (arrays := config["components"]["text_encoder"]["arrays"]).update(
            {ARRAY: arrays[OTHER], OTHER: arrays[ARRAY]}
        ),
    ],
    ids=["another model's fingerprint", "another scheduler", "two entries exchanged"],
)
def test_a_config_that_was_edited_is_refused(change, folder):
    edit_config(folder, change, signed=False)
    with pytest.raises(CheckpointError, match=r"config.json: digest is .*, but the content's is .*edited or damaged"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="edited or damaged"):
        verify_folder(folder)
    assert open_folder(folder, FAMILIES, verify=False).classes


def test_without_checks_the_same_weights_are_read(folder, converted):
    unchecked = open_folder(folder, FAMILIES, verify=False)
    assert_equal_weights(unchecked, open_checkpoint(converted), "text_encoder")
    flip(chunk(folder, ARRAY))
    assert unchecked.load("text_encoder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text(path.read_text() + " "), "1 files changed: tokenizer_2/tokenizer.json"),
        (lambda path: path.unlink(), "1 files missing: tokenizer_2/tokenizer.json"),
        (lambda path: path.with_name("added_tokens.json").write_text("{}"), "1 files unknown: tokenizer_2/added_tok"),
    ],
    ids=["changed", "missing", "added"],
)
def test_tokenizers_are_those_that_were_converted(change, message, folder):
    change(folder / "tokenizer_2" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder).tokenizer_folder("tokenizer_2")
    assert open_checkpoint(folder).tokenizer_folder("tokenizer").is_dir()
    with pytest.raises(CheckpointError, match=message):
        verify_folder(folder)


@pytest.mark.parametrize("name", ["_METADATA", f"{ARRAY}.value/.zarray"])
def test_what_orbax_reads_beside_the_chunks_is_compared(name, folder):
    path = folder / "weights/text_encoder" / name
    path.write_text(path.read_text() + " ")
    with pytest.raises(CheckpointError, match=f"1 files changed: weights/text_encoder/{re.escape(name)}"):
        verify_folder(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"1 files missing: weights/text_encoder/{re.escape(name)}"):
        verify_folder(folder)


def test_files_beside_what_was_written_are_named(folder):
    (folder / "weights/text_encoder/notes").mkdir()
    for name in ("note.txt", "weights/text_encoder/notes/note.txt", f"weights/text_encoder/{ARRAY}.value/9.0.0"):
        (folder / name).write_text("")
    assert verify_folder(folder) == [
        "note.txt", f"weights/text_encoder/{ARRAY}.value/9.0.0", "weights/text_encoder/notes/note.txt"
    ]  # fmt: skip


def test_all_bytes_of_a_sound_folder_are_compared(converted):
    told = []
    assert verify_folder(converted, lambda done, total: told.append((done, total))) == []
    nbytes = sum(path.stat().st_size for path in converted.rglob("*.value/[0-9]*"))
    assert told[-1] == (nbytes, nbytes) and nbytes > 1_000_000


@pytest.fixture
def snapshot(tiny_flux_dev, tmp_path):
    """As the hub's cache has it: links to blobs, large ones named by their sha256, small ones by their git hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    for path in tiny_flux_dev.rglob("*.*"):
        data = path.read_bytes()
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        name = file_sha256(path) if path.suffix == ".safetensors" else git
        (blobs / name).write_bytes(data)
        place = snapshot / path.relative_to(tiny_flux_dev)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(blobs / name)
    return snapshot


def test_a_snapshot_of_the_hub_is_compared_with_the_names_of_its_blobs(snapshot):
    (snapshot / "note.txt").write_text("")
    assert verify_folder(snapshot) == ["note.txt"]
    changed = ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json"]
    for name in changed:
        flip((snapshot / name).resolve())
    with pytest.raises(CheckpointError, match="has changed since it was fetched") as caught:
        verify_folder(snapshot)
    assert all(name in str(caught.value) for name in changed) and "text_encoder" not in str(caught.value)


def test_a_folder_without_checksums_says_so(tiny_flux_dev):
    with pytest.raises(CheckpointError, match="carries no checksums: it is a plain diffusers folder"):
        verify_folder(tiny_flux_dev)


def test_a_folder_has_another_digest_once_any_part_of_it_has_changed(tiny_flux_dev, folder, tmp_path):
    """Images say it: `dfa2 sample` took those of another VAE or scheduler for made already."""
    source = shutil.copytree(tiny_flux_dev, tmp_path / "source")
    (source / "images").mkdir()
    before = open_checkpoint(source).folder_digest
    (source / "images" / "cat.png").write_bytes(b"a cat")
    assert open_checkpoint(source).folder_digest == before
    changed = {before}
    for part in (
        "scheduler/scheduler_config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        os.utime(source / part, ns=(1, len(changed)))
        changed.add(open_checkpoint(source).folder_digest)
    assert len(changed) == 4
    assert open_checkpoint(folder).folder_digest != open_checkpoint(folder, verify=False).folder_digest
