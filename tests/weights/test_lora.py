"""Files of LoRAs: every spelling against the definition, W + scale alpha / rank B A, and every fault by its name."""

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

from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.weights.adapters import open_adapter
from dfa2_jax.weights.leaf import on_host
from dfa2_jax.weights.lora import adapted_digest

FLUX, SD3 = "tiny_flux_dev", "tiny_sd35"
ALL_FLUX = flux_modules() | FLUX_REST

SPELLINGS = {
    "diffusers flux": (FLUX, by_diffusers(ALL_FLUX), "peft", "transformer."),
    "diffusers sd3": (SD3, by_diffusers(sd3_modules()), "peft", "transformer."),
    "diffusers cogvideox": (
        "tiny_cogvideox_5b",
        {
            name: [name]
            for i in range(3)
            for name in (f"transformer_blocks.{i}.attn1.to_q", f"transformer_blocks.{i}.ff.net.2")
        },
        "peft",
        "transformer.",
    ),
    "old diffusers": (FLUX, by_diffusers(ALL_FLUX), "old", "transformer."),
    "peft alone": (FLUX, by_diffusers(flux_modules()), "peft", "base_model.model."),
    "no prefix": (SD3, by_diffusers(sd3_modules()), "peft", ""),
    "kohya flux": (FLUX, ALL_FLUX, "kohya", "lora_unet_"),
    "kohya sd3": (SD3, sd3_modules(), "kohya", "lora_unet_"),
    "kohya in diffusers' words": (FLUX, by_diffusers(ALL_FLUX), "kohya", "lora_transformer_"),
    "comfy flux": (FLUX, ALL_FLUX, "comfy", "diffusion_model."),
    "comfy sd3": (SD3, sd3_modules(), "comfy", "diffusion_model."),
    "fal": (FLUX, ALL_FLUX, "peft", "base_model.model."),
    "xlabs": (FLUX, xlabs_modules(), "xlabs", ""),
    "xlabs in comfy": (FLUX, xlabs_modules(), "xlabs", "diffusion_model."),
}


def arrays(checkpoint, component="transformer"):
    _, leaves = checkpoint.model_and_leaves(component, "float32", None)
    return {".".join(map(str, path)): on_host(leaf, np.dtype("float32")) for path, leaf in leaves.items()}


def check_sum(folder, file, deltas, tmp_path, scale=1.0, component="transformer"):
    """The checkpoint's weights with the LoRA are those of a folder that holds the sum."""
    checkpoint = open_checkpoint(folder)
    before = arrays(checkpoint, component)
    checkpoint.adapters = (open_adapter(checkpoint, file, scale),)
    ours = arrays(checkpoint, component)
    theirs = arrays(open_checkpoint(patched(folder, tmp_path / "patched", deltas, scale, component)), component)
    assert max(abs(theirs[name] - before[name]).max() for name in ours) > 0.01
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "spelling, rank, alpha",
    [
        *((spelling, 8, 2.0) for spelling in SPELLINGS),
        *((spelling, *more) for spelling in ("diffusers sd3", "kohya flux") for more in ((1, None), (8, None))),
    ],
)
def test_each_spelling_is_the_sum_of_the_definition(spelling, rank, alpha, request, tmp_path):
    name, modules, style, prefix = SPELLINGS[spelling]
    folder = request.getfixturevalue(name)
    files, deltas = factors(modules, shapes_in(folder), rank=rank, alpha=alpha, size=0.2)
    file = write(tmp_path / "lora.safetensors", spelled(files, style, prefix))
    check_sum(folder, file, deltas, tmp_path, scale=-0.7)


@pytest.mark.parametrize(
    "name, component, prefix, style",
    [
        (FLUX, "text_encoder", "text_encoder.", "peft"),
        (FLUX, "text_encoder", "lora_te1_", "kohya"),
        (FLUX, "text_encoder", "lora_te_", "kohya"),
        (FLUX, "text_encoder", "text_encoders.clip_l.transformer.", "comfy"),
        (SD3, "text_encoder", "lora_te1_", "kohya"),
        (SD3, "text_encoder_2", "lora_te2_", "kohya"),
        (SD3, "text_encoder_2", "text_encoder_2.", "peft"),
    ],
)
def test_clip_takes_its_own(name, component, prefix, style, request, tmp_path):
    folder = request.getfixturevalue(name)
    files, deltas = factors(clip_modules(), shapes_in(folder, component), alpha=3.0)
    file = write(tmp_path / "lora.safetensors", spelled(files, style, prefix))
    check_sum(folder, file, deltas, tmp_path, component=component)


def test_t5_of_kohya_takes_its_own(tiny_flux_dev, tmp_path):
    modules = {
        name: [name]
        for name in ("encoder.block.1.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wo")
    }
    files, deltas = factors(modules, shapes_in(tiny_flux_dev, "text_encoder_2"), size=0.3)
    file = write(tmp_path / "lora.safetensors", spelled(files, "kohya", "lora_te3_"))
    check_sum(tiny_flux_dev, file, deltas, tmp_path, component="text_encoder_2")


def test_the_patch_embedding_of_sd3_is_a_convolution(tiny_sd35, tmp_path):
    rng = np.random.default_rng(0)
    shape = shapes_in(tiny_sd35)["pos_embed.proj.weight"]
    up, down = rng.standard_normal((shape[0], 2, 1, 1)), rng.standard_normal((2, *shape[1:]))
    tensors = {"transformer.pos_embed.proj.lora_A.weight": down, "transformer.pos_embed.proj.lora_B.weight": up}
    file = write(tmp_path / "lora.safetensors", {key: x.astype(np.float32) for key, x in tensors.items()})
    delta = np.einsum("or,rchw->ochw", up[..., 0, 0], down).astype(np.float32)
    check_sum(tiny_sd35, file, {"pos_embed.proj.weight": delta}, tmp_path, scale=0.1)


def test_alpha_of_the_header_counts(tiny_flux_dev, tmp_path):
    files, deltas = factors(by_diffusers(flux_modules()), shapes_in(tiny_flux_dev), rank=4)
    said = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"single_transformer_blocks.1.proj_out": 2},
    }
    file = write(tmp_path / "lora.safetensors", spelled(files, "peft", "transformer."), said)
    deltas = {
        key: delta * (0.5 if "single_transformer_blocks.1.proj_out" in key else 2) for key, delta in deltas.items()
    }
    check_sum(tiny_flux_dev, file, deltas, tmp_path)
    (tmp_path / "patched").rename(tmp_path / "other")
    rs = write(
        tmp_path / "rs.safetensors",
        spelled(files, "peft", "transformer."),
        {"transformer.lora_alpha": 8, "transformer.use_rslora": True},
    )
    deltas = factors(by_diffusers(flux_modules()), shapes_in(tiny_flux_dev), rank=4)[1]
    check_sum(tiny_flux_dev, rs, {key: 4 * delta for key, delta in deltas.items()}, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_factors_may_have_other_types(dtype, tiny_flux_dev, tmp_path):
    files, _ = factors(flux_modules(), shapes_in(tiny_flux_dev))
    files = {name: (up.astype(dtype), down.astype(dtype), alpha) for name, (up, down, alpha) in files.items()}
    deltas = {}
    for name, parts in flux_modules().items():
        up, down, _ = (x if x is None else x.astype(np.float32) for x in files[name])
        rows = np.cumsum([shapes_in(tiny_flux_dev)[f"{part}.weight"][0] for part in parts])[:-1]
        deltas |= {f"{part}.weight": x for part, x in zip(parts, np.split(up @ down, rows), strict=True)}
    file = write(tmp_path / "lora.safetensors", spelled(files, "kohya", "lora_unet_"))
    check_sum(tiny_flux_dev, file, deltas, tmp_path)


def good(folder, modules=None):
    return spelled(factors(modules or flux_modules(), shapes_in(folder))[0], "comfy", "diffusion_model.")


X = np.zeros((4, 4), np.float32)
OTHERS = {
    "LoKr": {"lora_unet_double_blocks_0_img_attn_proj.lokr_w1": X},
    "LoHa": {"lora_unet_double_blocks_0_img_attn_proj.hada_w1_a": X},
    "DoRA": {"diffusion_model.double_blocks.0.img_attn.proj.dora_scale": X},
    "OFT": {"lora_unet_double_blocks_0_img_attn_proj.oft_blocks": X},
    "control LoRA": {"double_blocks.0.img_attn.norm.key_norm.scale": X},
    "whole differences": {"diffusion_model.double_blocks.0.img_attn.proj.diff_b": X},
    "biases": {"transformer.proj_out.lora_B.bias": X},
    "three factors": {"lora_unet_double_blocks_0_img_attn_proj.lora_mid.weight": X},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_by_name(kind, tiny_flux_dev, tmp_path):
    file = write(tmp_path / "other.safetensors", good(tiny_flux_dev) | OTHERS[kind])
    with pytest.raises(CheckpointError, match=rf"(?s)other\.safetensors is an? .*{kind}.*not supported") as caught:
        open_adapter(open_checkpoint(tiny_flux_dev), file)
    assert next(iter(OTHERS[kind])) in str(caught.value)


def named(*modules, style="kohya"):
    return spelled({module: (X, X, None) for module in modules}, style, "")


MODELS = {
    "Stable Diffusion XL": named(
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    ),
    "Stable Diffusion 1 or 2": named("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"),
    "Stable Diffusion 3": named("lora_unet_joint_blocks_0_x_block_attn_qkv"),
    "Wan": named("diffusion_model.blocks.0.self_attn.q", style="peft"),
    "Qwen-Image": named("transformer.transformer_blocks.0.img_mlp.net.2", style="peft"),
    "FLUX.2": named("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", style="peft"),
    "HunyuanVideo": named("diffusion_model.double_blocks.0.img_attn_qkv", style="peft"),
    "CogVideoX": named("transformer.transformer_blocks.0.attn1.to_q", style="peft"),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_lora_for_another_model_is_named(model, tiny_flux_dev, tmp_path):
    file = write(tmp_path / "other.safetensors", MODELS[model])
    with pytest.raises(CheckpointError, match=rf"is a LoRA for {model}, and .* is a FluxPipeline"):
        open_adapter(open_checkpoint(tiny_flux_dev), file)


@pytest.mark.parametrize("style, prefix", [("comfy", "diffusion_model."), ("kohya", "lora_unet_")])
def test_a_lora_of_flux_is_none_of_sd3(style, prefix, tiny_flux_dev, tiny_sd35, tmp_path):
    file = write(
        tmp_path / "lora.safetensors", spelled(factors(flux_modules(), shapes_in(tiny_flux_dev))[0], style, prefix)
    )
    with pytest.raises(CheckpointError, match=r"is a LoRA for FLUX\.1, and .* StableDiffusion3Pipeline"):
        open_adapter(open_checkpoint(tiny_sd35), file)


def test_xlabs_is_of_flux_alone(tiny_flux_dev, tiny_hunyuanvideo, tmp_path):
    files, _ = factors(xlabs_modules(), shapes_in(tiny_flux_dev))
    file = write(tmp_path / "lora.safetensors", spelled(files, "xlabs", ""))
    with pytest.raises(CheckpointError, match=r"(?s)LoRA for FLUX\.1.*14 unknown keys"):
        open_adapter(open_checkpoint(tiny_hunyuanvideo), file)


def changed(folder, **replaced):
    """A good file with some tensors in place of others; None: absent."""
    tensors = good(folder) | {key.replace("__", "."): x for key, x in replaced.items()}
    return {key: x for key, x in tensors.items() if x is not None}


PROJ = "diffusion_model.double_blocks.0.img_attn.proj"
FAULTS = {
    "1 unknown keys: diffusion_model.surprise.weight": {"diffusion_model.surprise.weight": X},
    "1 unknown keys: diffusion_model.double_blocks.7.img_mlp.0": {
        "diffusion_model.double_blocks.7.img_mlp.0.lora_down.weight": X,
        "diffusion_model.double_blocks.7.img_mlp.0.lora_up.weight": X,
    },
    r"wrong shapes: .*proj.* is \[65, 64\]": {f"{PROJ}.lora_up.weight": np.zeros((65, 4), np.float32)},
    r"1 factors of unequal rank: .*proj.* \[64, 5\] and \[4, 64\]": {
        f"{PROJ}.lora_up.weight": np.zeros((64, 5), np.float32)
    },
    "1 modules without both factors: .*img_attn.proj": {f"{PROJ}.lora_up.weight": None},
    "1 values that are not finite: .*img_attn.proj": {f"{PROJ}.lora_up.weight": np.full((64, 4), np.nan, np.float32)},
    "values that are not finite: .*img_attn.proj ": {f"{PROJ}.alpha": np.float32(np.inf).reshape(())},
    "not one number": {f"{PROJ}.alpha": np.zeros(3, np.float32)},
    "1 types that no LoRA has: .*I32": {f"{PROJ}.lora_up.weight": np.zeros((64, 4), np.int32)},
    "1 parameters that several keys change": {
        "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": np.zeros((4, 64), np.float32),
        "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": np.zeros((64, 4), np.float32),
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault, tiny_flux_dev, tmp_path):
    tensors = good(tiny_flux_dev) | FAULTS[fault]
    file = write(tmp_path / "lora.safetensors", {key: x for key, x in tensors.items() if x is not None})
    with pytest.raises(CheckpointError, match=f"(?s){fault.strip()}") as caught:
        open_adapter(open_checkpoint(tiny_flux_dev), file)
    assert str(file) in str(caught.value)


def test_what_is_no_lora_is_said_to_be_none(tiny_flux_dev, tmp_path):
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        open_adapter(
            open_checkpoint(tiny_flux_dev), tiny_flux_dev / "transformer" / "diffusion_pytorch_model.safetensors"
        )
    (tmp_path / "lora.ckpt").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickle is never read"):
        open_adapter(open_checkpoint(tiny_flux_dev), tmp_path / "lora.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_adapter(open_checkpoint(tiny_flux_dev), tmp_path / "absent.safetensors")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True, "1"])
def test_scales_are_finite_numbers(scale, tiny_flux_dev, tmp_path, no_shape_checks):
    file = write(tmp_path / "lora.safetensors", good(tiny_flux_dev))
    with pytest.raises(ValueError, match="must be a finite number"):
        open_adapter(open_checkpoint(tiny_flux_dev), file, scale)


def test_digests_see_files_and_scales_and_not_their_order(tiny_flux_dev, tmp_path):
    checkpoint = open_checkpoint(tiny_flux_dev)
    files = [
        write(
            tmp_path / f"{i}.safetensors",
            spelled(factors(flux_modules(), shapes_in(tiny_flux_dev), seed=i)[0], "comfy", ""),
        )
        for i in range(2)
    ]
    a, b = (open_adapter(checkpoint, file) for file in files)
    half = open_adapter(checkpoint, files[0], 0.5)
    assert adapted_digest("base", [a, b]) == adapted_digest("base", [b, a])
    digests = {adapted_digest("base", some) for some in ([], [a], [b], [half], [a, b])}
    assert len(digests) == 5
    assert adapted_digest("base", [open_adapter(checkpoint, files[0], 0.0)]) == "base"


def test_a_converted_folder_takes_a_lora_as_its_source_does(tiny_sd35, tmp_path):
    files, _ = factors(sd3_modules(), shapes_in(tiny_sd35))
    file = write(tmp_path / "lora.safetensors", spelled(files, "kohya", "lora_unet_"))
    plain, baked = tmp_path / "plain", tmp_path / "baked"
    convert_checkpoint(tiny_sd35, plain)
    convert_checkpoint(tiny_sd35, baked, loras=[(file, 0.5)])
    source, converted = open_checkpoint(tiny_sd35), open_checkpoint(plain)
    for checkpoint in (source, converted):
        checkpoint.adapters = (open_adapter(checkpoint, file, 0.5),)
    expected = arrays(source)
    for checkpoint in (converted, open_checkpoint(baked)):
        for name, array in arrays(checkpoint).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert checkpoint.adapted_fingerprint == source.adapted_fingerprint != source.fingerprint
