"""Which files of a component are read, and under which names: those that diffusers and transformers read."""

import json
import logging
import shutil

import numpy as np
import pytest
from damage import copy_model, edit_json, load, refuses
from safetensors.numpy import load_file, save_file

from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.weights.safetensors import open_weights

FULL = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def write_weights(folder, library, kind, value):
    """A single file, or an index with one shard, that hold one number."""
    stem = FULL[library]
    names = [f"{stem}.safetensors" if kind == "single" else f"{stem}-00001-of-00001.safetensors"]
    save_file({"x": np.float32([value])}, folder / names[0])
    if kind == "index":
        index = {"metadata": {}, "weight_map": {"x": names[0]}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("library, first", [("diffusers", "index"), ("transformers", "single")])
def test_a_single_file_beside_an_index(library, first, tmp_path, caplog):
    """diffusers looks for the index first, transformers for the single file; that both are there is logged."""
    for number, kind in enumerate(("single", "index")):
        write_weights(tmp_path, library, kind, number)
    with caplog.at_level(logging.WARNING, "dfa2_jax"):
        read = open_weights(tmp_path, library)
    assert read["x"].array() == ("single", "index").index(first)
    (record,) = caplog.records
    stem = FULL[library]
    assert f"{stem}.safetensors" in record.getMessage() and f"{stem}.safetensors.index.json" in record.getMessage()


def test_a_stale_index_beside_a_single_file_of_transformers(tmp_path):
    write_weights(tmp_path, "transformers", "index", 0)
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    write_weights(tmp_path, "transformers", "single", 1)
    assert open_weights(tmp_path, "transformers")["x"].array() == 1


def test_files_of_the_other_library_are_not_read(tmp_path):
    write_weights(tmp_path, "diffusers", "single", 0)
    with refuses(tmp_path, r"no safetensors weights \(model.safetensors or its index\)"):
        open_weights(tmp_path, "transformers")


def test_an_index_with_a_byte_order_mark(tmp_path):
    write_weights(tmp_path, "diffusers", "index", 3)
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert open_weights(tmp_path)["x"].array() == 3


def test_a_weight_file_of_another_name_in_the_config_is_refused(tiny_flux_dev, tmp_path):
    folder = shutil.copytree(tiny_flux_dev, tmp_path / "model")
    edit_json(folder / "text_encoder_2" / "config.json", transformers_weights="other.safetensors")
    with refuses(folder, "transformers_weights='other.safetensors'"):
        open_checkpoint(folder)


@pytest.mark.torch
@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_embeddings_of_t5_under_either_name(kept, tiny_flux_dev, tmp_path):
    """Where both are there and differ, transformers reads the encoder's own."""
    from transformers import T5EncoderModel

    folder = shutil.copytree(tiny_flux_dev, tmp_path / "model")
    file = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    shared = tensors.pop("shared.weight")
    names = ["shared.weight", "encoder.embed_tokens.weight"] if kept == "both" else [kept]
    save_file(tensors | {name: shared + number for number, name in enumerate(names)}, file, {"format": "pt"})
    theirs = T5EncoderModel.from_pretrained(folder / "text_encoder_2").encoder.embed_tokens.weight
    ours = open_checkpoint(folder).load("text_encoder_2").shared[...]
    np.testing.assert_array_equal(ours, theirs.detach().numpy())
    np.testing.assert_array_equal(ours, shared + (kept == "both"))


@pytest.mark.torch
def test_the_encoder_of_a_whole_t5(tiny_flux_dev, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    folder = shutil.copytree(tiny_flux_dev, tmp_path / "model")
    whole = T5ForConditionalGeneration(T5Config.from_pretrained(folder / "text_encoder_2"))
    whole.save_pretrained(folder / "text_encoder_2")
    ours = open_checkpoint(folder).load("text_encoder_2")
    np.testing.assert_array_equal(ours.shared[...], whole.shared.weight.detach().numpy())
    norm = whole.encoder.block[1].layer[0].layer_norm.weight.detach().numpy()
    np.testing.assert_array_equal(ours.layers.attention_norm.scale[...][1], norm)


@pytest.mark.torch
@pytest.mark.parametrize("family, has_projection", [("flux", False), ("sd35", True)])
def test_the_text_half_of_a_whole_clip(family, has_projection, tiny_flux_dev, tiny_sd35, tmp_path):
    """The config of transformers 4 left out what is default: it holds only what differs."""
    from transformers import CLIPConfig, CLIPModel

    folder = shutil.copytree({"flux": tiny_flux_dev, "sd35": tiny_sd35}[family], tmp_path / "model")
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    text["num_attention_heads"] = 8  # the default
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    config = CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 16}, projection_dim=32)
    whole = CLIPModel(config)
    shutil.rmtree(folder / "text_encoder")
    whole.save_pretrained(folder / "text_encoder")
    saved = json.loads((folder / "text_encoder" / "config.json").read_text())
    del saved["text_config"]["num_attention_heads"]
    edit_json(folder / "text_encoder" / "config.json", text_config=saved["text_config"])
    ours = open_checkpoint(folder).load("text_encoder")
    assert ours.config.num_attention_heads == 8 and ours.config.hidden_size == 32
    theirs = whole.text_model
    embedding = theirs.embeddings.token_embedding.weight.detach().numpy()
    np.testing.assert_array_equal(ours.token_embedding[...], embedding)
    np.testing.assert_array_equal(ours.final_layer_norm.bias[...], theirs.final_layer_norm.bias.detach().numpy())
    assert (ours.text_projection is not None) == has_projection
    if has_projection:
        projection = whole.text_projection.weight.detach().numpy().T
        np.testing.assert_array_equal(ours.text_projection.weight.kernel[...], projection)


def test_a_snapshot_of_links_is_read(tiny_flux_schnell, tmp_path):
    """As the hub's cache lays it out: names in a snapshot, bytes in a folder of blobs."""
    folder, blobs = copy_model(tiny_flux_schnell, tmp_path / "snapshots" / "1"), tmp_path / "blobs"
    blobs.mkdir()
    want = load(folder).proj_out.bias[...]
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        up = "../" * (len(path.relative_to(tmp_path).parts) - 1)
        path.symlink_to(f"{up}blobs/{number}")
    np.testing.assert_array_equal(load(folder).proj_out.bias[...], want)
