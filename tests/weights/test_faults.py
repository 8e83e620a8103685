"""Foreign and unsupported folders, keys, configs and numbers: each is told what is wrong with which file."""

import json
import re
import shutil

import numpy as np
import pytest
from convert_cases import edit_config
from damage import KEY, WEIGHTS, copy_model, edit_json, edit_tensors, load, refuses
from safetensors.numpy import load_file, save_file

from dfa2_jax import Pipeline
from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.families.registry import open_checkpoint


@pytest.fixture
def folder(tiny_flux_schnell, tmp_path):
    return copy_model(tiny_flux_schnell, tmp_path / "model")


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
        "x_embedder.weight is [64, 65], which does not fill x_embedder.weight.kernel [64, 64]",
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
        (
            "transformer/config.json",
            '{"in_channels": 384, "out_channels": 64}',
            "are no text-to-image FLUX.1's: FLUX.1-Fill is a FluxFillPipeline",
        ),
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


def test_float64_tensors_are_read(folder):
    """A script that merges models left one among float32."""
    want = load_file(folder / WEIGHTS)[KEY]
    edit_tensors(folder, lambda tensors: tensors.update({KEY: tensors[KEY].astype(np.float64)}))
    checkpoint = open_checkpoint(folder)
    (leaf,) = [leaf for leaf in checkpoint.leaves("transformer").values() if KEY in leaf.blocks[0].source]
    np.testing.assert_array_equal(leaf.blocks[0].read().reshape(want.T.shape).astype(np.float32), want.T)
    assert checkpoint.load("transformer").dtype == np.float32


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
    out = convert_checkpoint(folder, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with refuses(out, "format_version=99; this version reads 'dfa2-jax checkpoint', 2"):
        load(out)
    (out / "config.json").write_text(json.dumps(config))
    chunk = next((out / "weights" / "transformer" / "proj_out.weight.kernel.value").glob("[0-9]*"))
    chunk.unlink()
    with refuses(out, "proj_out.weight.kernel, chunk 0.0, cannot be read"):
        load(out)
    shutil.rmtree(chunk.parent)
    with refuses(out, "proj_out.weight.kernel.value"):
        load(out)


@pytest.mark.parametrize(
    ("family", "file", "change", "message"),
    [
        ("sd35", "tokenizer_3/tokenizer.json", "{", "tokenizer_3/tokenizer.json is not valid JSON"),
        ("sd35", "tokenizer/tokenizer.json", "[]", "tokenizer.json must hold a JSON object, not list"),
        (
            "sd35",
            "scheduler/scheduler_config.json",
            {"shift": None},
            "unusable scheduler_config.json: .*shift=None is not a positive",
        ),
        ("sd35", "scheduler/scheduler_config.json", {"shift": "x"}, "unusable scheduler_config.json"),
        ("sd35", "scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas"),
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
    with refuses(folder, "There is no folder owner/name here"):
        Pipeline.from_pretrained("owner/name")
    with refuses(folder, "absent is not a folder"):
        Pipeline.from_pretrained(tmp_path / "absent")


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


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("vae", {"layers_per_block": 10**6}, "layers_per_block=1000000 is not a number from 1 to 99"),
        ("vae", {"norm_num_groups": 0}, "norm_num_groups=0 is not a number from 1"),
        ("vae", {"block_out_channels": [32] * 10}, "must be from 1 to 9 levels"),
        ("vae", {"block_out_channels": [32] * 10**5}, "block_out_channels has 100000 entries, more than 999"),
        ("vae", {"block_out_channels": []}, "must be from 1 to 9 levels"),
        ("vae", {"scaling_factor": 0}, "scaling_factor=0 must be positive"),
        ("text_encoder", {"hidden_size": 10**9}, "hidden_size=1000000000 is not a number from 1 to 1048576"),
        ("text_encoder", {"num_attention_heads": 0}, "num_attention_heads=0 is not a number from 1"),
        ("text_encoder", {"max_position_embeddings": -77}, "max_position_embeddings=-77 is not a number from 1"),
        ("text_encoder", {"layer_norm_eps": -1e-5}, "layer_norm_eps=-1e-05 is not from 0 to 1"),
        ("text_encoder_3", {"vocab_size": 10**12}, "vocab_size=1000000000000 is not a number from 1 to 1048576"),
        ("text_encoder_3", {"layer_norm_epsilon": 2.0}, "layer_norm_epsilon=2.0 is not from 0 to 1"),
        ("text_encoder_3", {"relative_attention_num_buckets": 10**9}, "relative_attention_num_buckets=1000000000 is"),
        ("transformer", {"pos_embed_max_size": 10**8}, "pos_embed_max_size=100000000 is not a number from 1"),
        ("transformer", {"sample_size": 0}, "sample_size=0 is not a number from 1"),
        ("transformer", {"dual_attention_layers": [0] * 1000}, "dual_attention_layers has 1000 entries"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_absurd_sizes_are_named_before_anything_is_built(component, changes, message, tiny_sd35, tmp_path):
    folder = shutil.copytree(tiny_sd35, tmp_path / "model")
    edit_json(folder / component / "config.json", **changes)
    with refuses(folder, f"The {component} in .*{message}"):
        open_checkpoint(folder).config(component)


@pytest.mark.parametrize("value", [[], {}, 1, None])
def test_names_that_are_no_text(value, folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "converted")
    edit_json(folder / "model_index.json", _class_name=value)
    with refuses(folder, "model_index.json is of a"):
        open_checkpoint(folder)
    edit_config(
        tmp_path / "converted",
        lambda config: next(iter(config["components"]["transformer"]["arrays"].values())).update(dtype=value),
    )
    with refuses(tmp_path / "converted", "is not one of"):
        open_checkpoint(tmp_path / "converted")
