"""Damaged, foreign and unsupported folders: each is told what is wrong with which file."""

import json
import re
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dfa2_jax import Pipeline
from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.weights.safetensors import open_safetensors

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_flux_schnell, tmp_path):
    """Transformer and scheduler only, to be damaged."""
    folder = tmp_path / "model"
    for name in ("transformer", "scheduler"):
        shutil.copytree(tiny_flux_schnell / name, folder / name)
    index = json.loads((tiny_flux_schnell / "model_index.json").read_text())
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


# --- files


def rewrite_header(path, edit, header_bytes=None):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    text = edit(header)
    text = text if isinstance(text, bytes) else json.dumps(header if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data[8 + size :])


KEY = "x_embedder.bias"


def shift(header, by):
    begin, end = header[KEY]["data_offsets"]
    header[KEY]["data_offsets"] = [begin + by, end + by]


ENTRY = b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'

PAST_THE_END = "overlap: data_offsets|data_offsets give|tensors take"

METADATA = b'{"__metadata__":{"a":"%s"}}'

HEADERS = {
    "header longer than the file": ({"header_bytes": 2**40}, lambda h: None, "header claims 1099511627776 bytes"),
    "header over the limit": ({"header_bytes": 10**9}, lambda h: None, "header claims 1000000000 bytes"),
    "not JSON": ({}, lambda h: b"{not json", "expected"),
    "not an object": ({}, lambda h: b"[1]", r"starts with b'\['"),
    "deep nesting": ({}, lambda h: b'{"a":' + b"[" * 100_000, "expected"),
    "overlap": ({}, lambda h: shift(h, -4), "overlap: data_offsets start"),
    "gap": ({}, lambda h: shift(h, 4), "(gap|overlap): data_offsets start"),
    "past the end": ({}, lambda h: h[KEY].update(data_offsets=[0, 10**12]), PAST_THE_END),
    "negative": ({}, lambda h: h[KEY].update(data_offsets=[-4, 0]), "expected an integer"),
    "unknown dtype": ({}, lambda h: h[KEY].update(dtype="F7"), "unknown dtype 'F7'"),
    "huge shape": ({}, lambda h: h[KEY].update(shape=[2**40, 2**20]), "needs"),
    "duplicate": ({}, lambda h: b"{%s,%s}" % (ENTRY, ENTRY), "duplicate key 'a'"),
    "key outside of ASCII": ({}, lambda h: '{"é":{}}'.encode(), "expected a name in plain ASCII"),
    "long key": ({}, lambda h: b'{"%s":{}}' % (b"a" * 1001), "of at most 1000 characters"),
    "lone surrogate": ({}, lambda h: METADATA % rb"\ud800", "expected a string"),
    "no UTF-8": ({}, lambda h: METADATA % b"\xed\xa0\x80", "expected a string"),
    "too many": ({}, lambda h: b"{%s}" % b",".join(b'"%d%s' % (n, ENTRY[2:]) for n in range(10_001)), "more than 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_corrupt_headers(case, folder):
    options, edit, message = HEADERS[case]
    rewrite_header(folder / WEIGHTS, edit, **options)
    with refuses(folder, message) as caught:
        load(folder)
    assert str(folder / WEIGHTS) in str(caught.value) and "save it again" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files(keep, folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with refuses(folder, "smallest safetensors|header claims|tensors take"):
        load(folder)


def test_trailing_bytes(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"more")
    with refuses(folder, "has bytes that no tensor owns"):
        load(folder)


def test_the_reader_reads_what_safetensors_writes(tmp_path):
    tensors = {"a": np.arange(6.0).reshape(2, 3), "b": np.float16([1, 2]), "empty": np.zeros((0, 3), np.float32)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = open_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(read[key].array(), value)


def test_metadata_is_checked_without_a_copy(tmp_path):
    note = 'é €\U0001f600 "\\' * 100_000
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "x.safetensors", metadata={"note": note})
    escaped = json.dumps({"__metadata__": {"note": note}}).encode()
    (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", len(escaped)) + escaped)
    tracemalloc.start()
    try:
        assert list(open_safetensors(tmp_path / "x.safetensors")) == ["a"]
        assert not open_safetensors(tmp_path / "y.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def shard(folder, weight_map=None):
    """Two shards and their index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys, names = sorted(tensors), ("a.safetensors", "b.safetensors")
    parts = {names[0]: keys[::2], names[1]: keys[1::2]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / "transformer" / name)
    full = {key: name for name, part in parts.items() for key in part} | (weight_map or {})
    index = {
        "metadata": {"total_size": 1.5e-3, "note": "é"},
        "weight_map": {key: name for key, name in full.items() if name is not None},
    }
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_load(folder):
    whole = load(folder)
    shard(folder)
    np.testing.assert_array_equal(load(folder).proj_out.kernel[...], whole.proj_out.kernel[...])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({KEY: "../../outside.safetensors"}, "only plain names of safetensors files in the same"),
        ({KEY: "/etc/passwd"}, "only plain names"),
        ({KEY: 3}, "is not a sound index: expected a name"),
        ({KEY: "absent.safetensors"}, "names absent.safetensors, which is missing"),
        ({"more.weight": "a.safetensors"}, "names 1 keys that no shard holds, first 'more.weight'"),
        ({KEY: None}, f"holds key '{KEY}'"),
    ],
)
def test_bad_indexes(weight_map, message, folder):
    shard(folder, weight_map)
    with refuses(folder, message):
        load(folder)


def test_missing_shard_and_key_in_two_shards(folder):
    shard(folder)
    extra = load_file(folder / "transformer" / "a.safetensors")
    other = load_file(folder / "transformer" / "b.safetensors")
    save_file(other | dict(list(extra.items())[:1]), folder / "transformer" / "b.safetensors")
    with refuses(folder, "is in two shards"):
        load(folder)
    (folder / "transformer" / "b.safetensors").unlink()
    with refuses(folder, "names b.safetensors, which is missing"):
        load(folder)


# --- keys


def test_all_faults_are_reported_together(folder):
    def edit(tensors):
        tensors["surprise.weight"] = np.zeros(3, np.float32)
        tensors["transformer_blocks.7.attn.to_q.weight"] = np.zeros((64, 64), np.float32)
        del tensors["single_transformer_blocks.1.proj_mlp.bias"]
        del tensors["proj_out.bias"]
        tensors["x_embedder.weight"] = np.zeros((64, 65), np.float32)

    edit_tensors(folder, edit)
    with refuses(folder, "is not a FluxTransformer2DModel as its config.json says") as caught:
        load(folder)
    for part in (
        "surprise.weight",
        "transformer_blocks.7.attn.to_q.weight",
        "single_transformer_blocks.ff.up.bias, layer 1",
        "proj_out.bias",
        "x_embedder.weight is [64, 65], which does not fill x_embedder.kernel [64, 64]",
    ):
        assert part in str(caught.value)


def test_duplicate_keys_under_two_names(tiny_flux_dev, tmp_path):
    folder = shutil.copytree(tiny_flux_dev, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = "final_layer_norm.weight"
    bare = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    save_file(bare | {f"text_model.{name}": bare[name]}, file)
    with refuses(folder, "1 duplicate keys: .*final_layer_norm.weight"):
        open_checkpoint(folder).load("text_encoder")


# --- folders


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "'StableDiffusionXLPipeline'; supported are"),
        ({"transformer": ["diffusers", "UNet2DConditionModel"]}, "transformer='UNet2DConditionModel'.* needs Flux"),
        ({"transformer": ...}, "names no transformer"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler='DDIMScheduler'"),
        ({"transformer": "Flux"}, "names no transformer"),
        ({"transformer": [1, 2]}, "not a pair of library and class"),
    ],
)
def test_other_models_are_named(changes, message, folder):
    edit_json(folder / "model_index.json", **changes)
    with refuses(folder, message):
        load(folder)


def test_a_folder_of_one_component(folder):
    with refuses(folder, "is a single 'FluxTransformer2DModel'"):
        open_checkpoint(folder / "transformer")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model_index.json", "{", "is not valid JSON"),
        ("model_index.json", '{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("model_index.json", "[]", "must hold a JSON object, not list"),
        ("transformer/config.json", "[" * 100_000, "is not valid JSON"),
        ("transformer/config.json", '{"num_layers": -1}', "unusable config.json|is not a FluxTransformer2DModel"),
        ("transformer/config.json", '{"attention_head_dim": "many"}', "unusable config.json"),
        ("transformer/config.json", '{"in_channels": 384, "out_channels": 64}', "Only text-to-image FLUX.1"),
    ],
)
def test_bad_json(file, text, message, folder):
    (folder / file).write_text(text)
    with refuses(folder, message):
        load(folder)


def test_absent_files_are_named(folder):
    (folder / WEIGHTS).rename(folder / "transformer" / "weights.bin")
    with refuses(folder, "pickle is never read"):
        load(folder)
    (folder / "transformer" / "config.json").unlink()
    with refuses(folder, "config.json cannot be read: No such file"):
        load(folder)


# --- numbers


def test_quantised_weights_are_refused(folder):
    edit_json(folder / "transformer" / "config.json", quantization_config={"quant_method": "fp8"})
    with refuses(folder, "quantization_config"):
        load(folder)
    edit_json(folder / "transformer" / "config.json", quantization_config=...)
    edit_tensors(folder, lambda tensors: tensors.update({KEY: tensors[KEY].astype(np.int8)}))
    with refuses(folder, f"{KEY} is I8: quantised weights are not supported"):
        load(folder)


@pytest.mark.parametrize("key", [KEY, "single_transformer_blocks.1.proj_mlp.weight"])
def test_float16_overflow_names_the_key(key, folder, tmp_path):
    from dfa2_jax.conversion import convert_checkpoint

    def edit(tensors):
        tensors[key].flat[3] = 70_000.0  # float16 ends at 65,504

    edit_tensors(folder, edit)
    for action in (
        lambda: open_checkpoint(folder).load("transformer", "float16"),
        lambda: convert_checkpoint(folder, tmp_path / "out", "float16"),
    ):
        with refuses(folder, f"{key} holds values that are not finite in float16"):
            action()
    assert not (tmp_path / "out").exists()
    open_checkpoint(folder).load("transformer", "bfloat16")


def test_a_damaged_converted_folder(folder, tmp_path):
    from dfa2_jax.conversion import convert_checkpoint

    out = convert_checkpoint(folder, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with refuses(out, "format_version=99; this version reads 'dfa2-jax checkpoint', 2"):
        load(out)
    (out / "config.json").write_text(json.dumps(config))
    chunk = next((out / "weights" / "transformer" / "proj_out.weight.kernel.value").glob("[0-9]*"))
    chunk.unlink()
    with refuses(out, "proj_out.weight.kernel.value cannot be read"):
        load(out)
    shutil.rmtree(chunk.parent)
    with refuses(out, "proj_out.weight.kernel.value"):
        load(out)


@pytest.mark.parametrize(
    ("family", "file", "change", "message"),
    [
        ("sd35", "tokenizer_3/tokenizer.json", "{", "tokenizer_3 is not a tokenizer that can be read"),
        ("sd35", "tokenizer/tokenizer.json", "[]", "tokenizer is not a tokenizer that can be read"),
        (
            "sd35",
            "scheduler/scheduler_config.json",
            {"shift": None},
            "unusable scheduler_config.json: .*shift=None is not a positive",
        ),
        ("sd35", "scheduler/scheduler_config.json", {"shift": "x"}, "unusable scheduler_config.json"),
        ("sd35", "scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("sd35", "vae/config.json", {"scaling_factor": None}, "The vae in .* config.json: scaling_factor=None"),
        ("sd35", "text_encoder/config.json", {"eos_token_id": None}, "The text_encoder in .*eos_token_id=None"),
        ("sd35", "transformer/config.json", {"sample_size": True}, "The transformer in .*sample_size=True is not int"),
        ("flux", "transformer/config.json", {"axes_dims_rope": 5}, "The transformer in .* config.json"),
        ("flux", "transformer/config.json", {"guidance_embeds": 1}, "guidance_embeds=1 is not bool"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_damaged_configs_are_named_before_anything_is_written(
    family, file, change, message, tiny_sd35, tiny_flux_schnell, tmp_path
):
    folder = shutil.copytree({"sd35": tiny_sd35, "flux": tiny_flux_schnell}[family], tmp_path / "model")
    if isinstance(change, dict):
        edit_json(folder / file, **change)
    else:
        (folder / file).write_text(change)
    with refuses(folder, message):
        convert_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with refuses(folder, message):
        Pipeline.from_pretrained(folder)("a star", height=64, width=64, num_inference_steps=1, progress=False)


def test_the_pipeline_passes_faults_on(folder, tmp_path):
    with refuses(folder, "is not a folder, nor a hub id"):
        Pipeline.from_pretrained("owner/name")


# --- shapes and configs that only look right


@pytest.mark.parametrize(
    "key, shape",
    [
        ("pos_embed.proj.weight", (64, 4, 4, 4)),  # as many numbers as (64, 16, 2, 2), in other patches
        ("pos_embed.proj.weight", (64, 16, 4, 1)),
        ("pos_embed.pos_embed", (2, 576, 64)),  # two tables
    ],
)
def test_misshapen_patches_and_position_tables(key, shape, tiny_sd35, tmp_path):
    folder = shutil.copytree(tiny_sd35, tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({key: np.zeros(shape, np.float32)}))
    with refuses(folder, rf"1 wrong shapes: {re.escape(key)} is {re.escape(str(list(shape)))}"):
        load(folder)


@pytest.mark.parametrize("value", [None, 1.5, "x", [], {}, 10**30, 10**6])
@pytest.mark.parametrize(
    "component, field",
    [("transformer", "num_layers"), ("text_encoder", "num_hidden_layers"), ("text_encoder_3", "num_layers")],
)
def test_impossible_layer_counts(component, field, value, tiny_sd35, tmp_path):
    folder = shutil.copytree(tiny_sd35, tmp_path / "model")
    edit_json(folder / component / "config.json", **{field: value})
    with refuses(folder, rf"The {component} in .*{field}|The {component} in .*config.json"):
        open_checkpoint(folder).leaves(component)


@pytest.mark.parametrize("value", [[], {}, 1, None])
def test_names_that_are_no_text(value, folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "converted")
    edit_json(folder / "model_index.json", _class_name=value)
    with refuses(folder, "model_index.json is of a"):
        open_checkpoint(folder)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    config["components"]["transformer"]["dtype"] = value
    (tmp_path / "converted" / "config.json").write_text(json.dumps(config))
    with refuses(folder, "of transformer is not one of"):
        open_checkpoint(tmp_path / "converted")
