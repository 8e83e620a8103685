"""LoRAs upon a pipeline: images of diffusers', weights that come back, programs that stay, and what knows of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_cases import (
    FLUX_REST,
    by_diffusers,
    clip_modules,
    factors,
    flux_modules,
    patched,
    sd3_modules,
    shapes_in,
    spelled,
    write,
    xlabs_modules,
)

from dfa2_jax import Pipeline, Plan, PlanError
from dfa2_jax.cli import convert, lora, main
from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.io.images import read_metadata

CALL = {"height": 64, "width": 64, "max_sequence_length": 16, "num_inference_steps": 2, "output_type": "latent"}
NOISE = {"FluxPipeline": (1, 16, 64), "StableDiffusion3Pipeline": (1, 16, 8, 8)}
FLUX, SD3 = "tiny_flux_dev", "tiny_sd35"
MODULES = {FLUX: flux_modules(), SD3: sd3_modules()}


def noise_of(pipeline):
    return np.random.default_rng(0).standard_normal(NOISE[pipeline.pipeline_class]).astype(np.float32)


def latents(pipeline, **more):
    return pipeline("a red circle", latents=noise_of(pipeline), progress=False, **CALL, **more).images


def bits(pipeline, name=None):
    component = pipeline.transformer if name is None else pipeline.networks[name]
    return [np.asarray(x) for x in jax.tree.leaves(component.params)]


def equal(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def file(request, tmp_path):
    """Makes a kohya LoRA for a folder, blocks alone, and its sums by diffusers' keys."""

    def make(name, number=0, *, size=0.1, text=False):
        folder = request.getfixturevalue(name)
        files, _ = factors(MODULES[name], shapes_in(folder), rank=4, alpha=2.0, seed=number, size=size)
        tensors = spelled(files, "kohya", "lora_unet_")
        if text:
            clip, _ = factors(clip_modules(), shapes_in(folder, "text_encoder"), seed=number, size=0.3)
            tensors |= spelled(clip, "kohya", "lora_te1_")
        return write(tmp_path / f"lora{number}.safetensors", tensors)

    return make


THEIRS = {
    "diffusers flux": (FLUX, by_diffusers(flux_modules()), "peft", "transformer.", None),
    "diffusers flux, alpha": (FLUX, by_diffusers(flux_modules()), "peft", "transformer.", 6.0),
    "diffusers sd3": (SD3, by_diffusers(sd3_modules()), "peft", "transformer.", None),
    "kohya flux": (FLUX, {k: v for k, v in flux_modules().items() if "linear1" not in k}, "kohya", "lora_unet_", 2.0),
    "comfy flux": (
        FLUX,
        {k: v for k, v in flux_modules().items() if "linear1" not in k},
        "comfy",
        "diffusion_model.",
        2.0,
    ),
    "xlabs": (FLUX, xlabs_modules(), "xlabs", "", None),
    "clip flux": (FLUX, clip_modules(), "peft", "text_encoder.", None),
    "clip sd3": (SD3, clip_modules(), "peft", "text_encoder.", None),
}
"""kohya's `linear1` has FLUX.1's own width in diffusers 0.42, and no other: tests/weights/test_lora.py has it."""


@pytest.mark.torch
@pytest.mark.parametrize("case", THEIRS)
def test_latents_are_those_of_diffusers(case, request, tmp_path):
    import diffusers
    import torch

    name, modules, style, prefix, alpha = THEIRS[case]
    folder, component = request.getfixturevalue(name), "text_encoder" if "clip" in case else "transformer"
    shapes = shapes_in(folder, component)
    size = 0.3 if "clip" in case else 0.1
    file = write(
        tmp_path / "lora.safetensors", spelled(factors(modules, shapes, alpha=alpha, size=size)[0], style, prefix)
    )
    pipeline = Pipeline.from_pretrained(folder)
    before = latents(pipeline)
    pipeline.load_lora(file, 0.7)
    ours = latents(pipeline)

    reference = diffusers.DiffusionPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    reference.load_lora_weights(file, adapter_name="own")
    assert reference.get_list_adapters() == {component: ["own"]}
    reference.fuse_lora(components=[component], lora_scale=0.7)
    noise = torch.from_numpy(noise_of(pipeline))
    theirs = reference("a red circle", latents=noise, **CALL).images.numpy()
    assert abs(theirs - before).max() > 1e-2
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [FLUX, SD3])
def test_loras_come_and_go_and_the_weights_come_back(name, request, file):
    pipeline = Pipeline.from_pretrained(request.getfixturevalue(name))
    before, plain, (fingerprint, folder_digest) = (
        bits(pipeline),
        latents(pipeline),
        (pipeline.fingerprint, pipeline.folder_digest),
    )
    first, second = file(name), file(name, 1)
    assert pipeline.load_lora(first, 0.5) == "lora0"
    one, only_first = latents(pipeline), pipeline.fingerprint
    assert not np.array_equal(one, plain) and only_first != fingerprint and pipeline.folder_digest != folder_digest
    pipeline.load_lora(second, -0.25)
    assert [(name, each["scale"]) for name, each in pipeline.loras.items()] == [("lora0", 0.5), ("lora1", -0.25)]
    assert "LoRA lora1: scale -0.25" in repr(pipeline)
    both = latents(pipeline)
    assert not np.array_equal(both, one)
    pipeline.unload_lora("lora1")
    np.testing.assert_array_equal(latents(pipeline), one)
    assert pipeline.fingerprint == only_first
    pipeline.load_lora(second, 2.0, "other")
    pipeline.unload_lora()
    assert equal(bits(pipeline), before) and pipeline.loras == {}
    assert (pipeline.fingerprint, pipeline.folder_digest) == (fingerprint, folder_digest)
    with pytest.raises(ValueError, match=r"no LoRA 'other'; there are \[\]"):
        pipeline.unload_lora("other")


def test_two_are_the_base_and_their_sum(tiny_flux_dev, tmp_path):
    files, deltas = zip(*(factors(flux_modules(), shapes_in(tiny_flux_dev), seed=seed) for seed in (0, 1)), strict=True)
    pipeline = Pipeline.from_pretrained(tiny_flux_dev)
    for number, scale in enumerate((0.5, -0.8)):
        pipeline.load_lora(
            write(tmp_path / f"{number}.safetensors", spelled(files[number], "kohya", "lora_unet_")), scale
        )
    total = {key: np.float32(0.5) * deltas[0][key] - np.float32(0.8) * deltas[1][key] for key in deltas[0]}
    theirs = Pipeline.from_pretrained(patched(tiny_flux_dev, tmp_path / "sum", total))
    for ours, expected in zip(bits(pipeline), bits(theirs), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_a_scale_of_zero_is_the_base(tiny_flux_dev, file):
    pipeline = Pipeline.from_pretrained(tiny_flux_dev)
    before, fingerprint = bits(pipeline), pipeline.fingerprint
    pipeline.load_lora(file(FLUX), 0.0)
    assert equal(bits(pipeline), before) and pipeline.fingerprint == fingerprint


def test_a_name_is_of_one_file(tiny_flux_dev, file, tmp_path):
    pipeline, first = Pipeline.from_pretrained(tiny_flux_dev), file(FLUX)
    pipeline.load_lora(first)
    full = bits(pipeline)
    pipeline.load_lora(first, 0.5)
    assert pipeline.loras["lora0"]["scale"] == 0.5 and not equal(bits(pipeline), full)
    (tmp_path / "other").mkdir()
    second = file(FLUX, 1).rename(tmp_path / "other" / "lora0.safetensors")
    with pytest.raises(ValueError, match=r"would have the name 'lora0' of .*: pass name="):
        pipeline.load_lora(second)
    pipeline.load_lora(second, name="second")
    assert list(pipeline.loras) == ["lora0", "second"]


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_nothing_compiles_when_a_lora_or_its_scale_changes(dtype, tiny_flux_dev, file, compilations):
    pipeline, first, second = Pipeline.from_pretrained(tiny_flux_dev, dtype=dtype), file(FLUX, text=True), file(FLUX, 1)
    plain = latents(pipeline)
    del compilations[:]
    pipeline.load_lora(first)
    assert not np.array_equal(latents(pipeline), plain)
    pipeline.load_lora(first, 0.5)
    pipeline.load_lora(second)
    latents(pipeline)
    pipeline.unload_lora()
    np.testing.assert_array_equal(latents(pipeline), plain)
    assert compilations == []


def test_weights_stay_of_their_type_and_place(tiny_flux_dev, file):
    pipeline = Pipeline.from_pretrained(tiny_flux_dev, dtype="bfloat16", devices=2, shard_weights=True)
    before = [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(pipeline.transformer.params)]
    pipeline.load_lora(file(FLUX))
    assert [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(pipeline.transformer.params)] == before
    assert {x.dtype for x in jax.tree.leaves(pipeline.transformer.params)} == {jnp.dtype("bfloat16")}
    assert all(len(x.sharding.device_set) == 2 for x in jax.tree.leaves(pipeline.transformer.params))
    alone = Pipeline.from_pretrained(tiny_flux_dev, dtype="bfloat16")
    alone.load_lora(file(FLUX))
    assert equal(bits(pipeline), bits(alone))


@pytest.mark.parametrize("dtype", ["int8", "int8_weights", "float8"])
def test_quantised_blocks_are_of_the_sum(dtype, tiny_sd35, tmp_path, caplog):
    files, deltas = factors(sd3_modules(), shapes_in(tiny_sd35))
    path = write(tmp_path / "lora.safetensors", spelled(files, "kohya", "lora_unet_"))
    pipeline = Pipeline.from_pretrained(tiny_sd35, dtype=dtype)
    before = bits(pipeline)
    pipeline.load_lora(path)
    assert f"is added before blocks are quantised to {dtype}" in caplog.text
    theirs = Pipeline.from_pretrained(patched(tiny_sd35, tmp_path / "sum", deltas), dtype=dtype)
    for ours, expected in zip(bits(pipeline), bits(theirs), strict=True):
        step = (
            1
            if ours.dtype == np.int8
            else 0.07 * abs(expected.astype(np.float32)).max()
            if ours.dtype.itemsize == 1
            else 1e-5
        )
        assert abs(ours.astype(np.float32) - expected.astype(np.float32)).max() <= step
    pipeline.unload_lora()
    assert equal(bits(pipeline), before)


def test_a_folder_in_8_bits_refuses_a_lora_and_bakes_one(tiny_sd35, tmp_path, file):
    path = file(SD3)
    convert_checkpoint(tiny_sd35, tmp_path / "plain", "int8")
    pipeline = Pipeline.from_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"holds in int8\. Convert its source again with dfa2-convert --lora"):
        pipeline.load_lora(path)
    assert convert([str(tiny_sd35), str(tmp_path / "baked"), "--dtype", "int8", "--lora", f"{path}:0.5"]) == 0
    source = Pipeline.from_pretrained(tiny_sd35, dtype="int8")
    source.load_lora(path, 0.5)
    baked = Pipeline.from_pretrained(tmp_path / "baked")
    assert equal(bits(baked), bits(source)) and baked.fingerprint == source.fingerprint
    said = json.loads((tmp_path / "baked" / "config.json").read_text())["loras"]
    assert [(entry["name"], entry["scale"]) for entry in said] == [("lora0", 0.5)]


def test_text_encoders_take_it_loaded_or_not(tiny_flux_dev, file):
    path = file(FLUX, text=True)
    late, early = (Pipeline.from_pretrained(tiny_flux_dev) for _ in range(2))
    plain = np.asarray(early.encode_prompt("red").pooled)
    early.load_lora(path)
    late.load_lora(path)
    with_lora = np.asarray(early.encode_prompt("red").pooled)
    assert not np.array_equal(with_lora, plain)
    np.testing.assert_array_equal(late.encode_prompt("red").pooled, with_lora)
    late.networks.release_text_encoders()
    np.testing.assert_array_equal(late.encode_prompt("red").pooled, with_lora)
    late.networks.release_text_encoders()
    for pipeline in (early, late):
        pipeline.unload_lora()
        np.testing.assert_array_equal(pipeline.encode_prompt("red").pooled, plain)


def test_a_plan_made_without_it_is_refused_until_it_is_for_these_weights(tiny_flux_dev, file):
    pipeline = Pipeline.from_pretrained(tiny_flux_dev)
    plan = Plan.full(pipeline.setting(prompt="red", **CALL))
    expected = latents(pipeline, plan=plan)
    pipeline.load_lora(file(FLUX))
    with pytest.raises(PlanError, match=r"weights is .* plan\.for_weights\(pipeline\)"):
        latents(pipeline, plan=plan)
    own = plan.for_weights(pipeline)
    assert not np.array_equal(latents(pipeline, plan=own), expected)
    pipeline.unload_lora()
    with pytest.raises(PlanError, match="weights is"):
        latents(pipeline, plan=own)
    np.testing.assert_array_equal(latents(pipeline, plan=plan), expected)


def test_what_fails_leaves_all_as_it_was(tiny_flux_dev, file, tmp_path):
    pipeline = Pipeline.from_pretrained(tiny_flux_dev)
    pipeline.load_lora(file(FLUX), 0.5)
    before, fingerprint = bits(pipeline), pipeline.fingerprint
    wrong = write(tmp_path / "wrong.safetensors", {"lora_unet_surprise.lora_up.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(CheckpointError, match="without both factors"):
        pipeline.load_lora(wrong)
    with pytest.raises(CheckpointError, match="holds"):  # each value is finite, and their sum is not
        pipeline.load_lora(file(FLUX, 1, size=1e10), 1e30)
    assert equal(bits(pipeline), before) and pipeline.fingerprint == fingerprint and list(pipeline.loras) == ["lora0"]


def test_metadata_names_loras_and_again_uses_them(tiny_flux_dev, file, tmp_path, capsys):
    path = file(FLUX, text=True)
    flags = ["--height", "64", "--width", "64", "--steps", "2", "--max-sequence-length", "16", "--quiet"]
    out = tmp_path / "image.png"
    command = ["sample", str(tiny_flux_dev), "--prompt", "red", *flags, "--out", str(out)]
    assert main([*command, "--lora", f"{path}:0.5"]) == 0
    (said,) = read_metadata(out)["loras"]
    assert (said["file"], said["scale"]) == (str(path), 0.5)
    assert main(["again", str(out), "--out", str(tmp_path / "again.png"), "--quiet"]) == 0
    assert "bit for bit" in capsys.readouterr().err
    kept = path.read_bytes()
    file(FLUX, 0)
    assert main(["again", str(out), "--out", str(tmp_path / "other.png"), "--quiet"]) == 2
    assert "and that file now has" in capsys.readouterr().err
    path.unlink()
    assert main(["again", str(out), "--out", str(tmp_path / "other.png"), "--quiet"]) == 2
    assert "which is not there: put it back" in capsys.readouterr().err
    path.write_bytes(kept)
    pipeline = Pipeline.from_pretrained(tiny_flux_dev)
    assert "loras" not in pipeline("red", progress=False, **CALL).metadata


def test_flags_split_at_the_last_colon():
    assert [lora(text) for text in ("a.safetensors", "a.safetensors:0.5", "C:a.safetensors", "x:y:-1")] == [
        (path, scale)
        for path, scale in zip(
            map(type(lora("a")[0]), ("a.safetensors", "a.safetensors", "C:a.safetensors", "x:y")),
            (1.0, 0.5, 1.0, -1.0),
            strict=True,
        )
    ]


def test_embedders_and_the_last_layer_take_it_as_well(tiny_flux_dev, tmp_path):
    files, deltas = factors(FLUX_REST, shapes_in(tiny_flux_dev))
    pipeline = Pipeline.from_pretrained(tiny_flux_dev)
    pipeline.load_lora(write(tmp_path / "lora.safetensors", spelled(files, "kohya", "lora_unet_")))
    theirs = Pipeline.from_pretrained(patched(tiny_flux_dev, tmp_path / "sum", deltas))
    np.testing.assert_allclose(latents(pipeline), latents(theirs), rtol=0, atol=1e-4)
