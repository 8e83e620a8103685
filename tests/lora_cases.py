"""LoRA files in every spelling, and what each adds to a diffusers state dict, by the definition alone."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ATTENTION = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def flux_modules(double=2, single=3):
    """BFL's name of each matrix of FLUX.1, and diffusers' names of its rows' parts."""
    modules = {}
    for i in range(double):
        ours, theirs = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        modules |= {
            f"{ours}img_attn.qkv": [f"{theirs}attn.{name}" for name in ATTENTION],
            f"{ours}txt_attn.qkv": [f"{theirs}attn.{name}" for name in ADDED],
            f"{ours}img_attn.proj": [f"{theirs}attn.to_out.0"],
            f"{ours}txt_attn.proj": [f"{theirs}attn.to_add_out"],
            f"{ours}img_mlp.0": [f"{theirs}ff.net.0.proj"],
            f"{ours}img_mlp.2": [f"{theirs}ff.net.2"],
            f"{ours}txt_mlp.0": [f"{theirs}ff_context.net.0.proj"],
            f"{ours}txt_mlp.2": [f"{theirs}ff_context.net.2"],
            f"{ours}img_mod.lin": [f"{theirs}norm1.linear"],
            f"{ours}txt_mod.lin": [f"{theirs}norm1_context.linear"],
        }
    for i in range(single):
        ours, theirs = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        modules |= {
            f"{ours}linear1": [*(f"{theirs}attn.{name}" for name in ATTENTION), f"{theirs}proj_mlp"],
            f"{ours}linear2": [f"{theirs}proj_out"],
            f"{ours}modulation.lin": [f"{theirs}norm.linear"],
        }
    return modules


FLUX_REST = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
"""FLUX.1's matrices outside of blocks. The last one has its halves the other way round."""


def xlabs_modules(double=2, single=3):
    modules = {}
    for i in range(double):
        ours, theirs = f"double_blocks.{i}.processor.", f"transformer_blocks.{i}.attn."
        modules |= {
            f"{ours}qkv_lora1": [theirs + name for name in ATTENTION],
            f"{ours}qkv_lora2": [theirs + name for name in ADDED],
            f"{ours}proj_lora1": [f"{theirs}to_out.0"],
            f"{ours}proj_lora2": [f"{theirs}to_add_out"],
        }
    for i in range(single):
        ours, theirs = f"single_blocks.{i}.processor.", f"single_transformer_blocks.{i}."
        modules |= {f"{ours}qkv_lora": [f"{theirs}attn.{name}" for name in ATTENTION]}
        modules |= {f"{ours}proj_lora": [f"{theirs}proj_out"]}
    return modules


def sd3_modules(blocks=4, dual=(0, 1)):
    """Stability AI's name of each matrix of SD3.5, and diffusers' names of its rows' parts."""
    modules = {
        "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
        "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
        "context_embedder": ["context_embedder"],
        "final_layer.linear": ["proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    }
    for i in range(blocks):
        for stream, names, out, mlp, norm in (
            ("x", ATTENTION, "to_out.0", "ff", "norm1"),
            ("context", ADDED, "to_add_out", "ff_context", "norm1_context"),
        ):
            ours, theirs = f"joint_blocks.{i}.{stream}_block.", f"transformer_blocks.{i}."
            modules[f"{ours}attn.qkv"] = [f"{theirs}attn.{name}" for name in names]
            modules[f"{ours}adaLN_modulation.1"] = [f"{theirs}{norm}.linear"]
            if stream == "x" or i < blocks - 1:
                modules[f"{ours}attn.proj"] = [f"{theirs}attn.{out}"]
                modules[f"{ours}mlp.fc1"] = [f"{theirs}{mlp}.net.0.proj"]
                modules[f"{ours}mlp.fc2"] = [f"{theirs}{mlp}.net.2"]
            if stream == "x" and i in dual:
                modules[f"{ours}attn2.qkv"] = [f"{theirs}attn2.{name}" for name in ATTENTION]
                modules[f"{ours}attn2.proj"] = [f"{theirs}attn2.to_out.0"]
    return modules


SWAPPED = ("final_layer.adaLN_modulation.1", "joint_blocks.3.context_block.adaLN_modulation.1")
"""Matrices that have shifts before scales, where diffusers' have scales first."""


def clip_modules(layers=3):
    names = [*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]
    return {
        f"text_model.encoder.layers.{i}.{name}": [f"encoder.layers.{i}.{name}"] for i in range(layers) for name in names
    }


def shapes_in(folder, component="transformer"):
    """By key, the shapes of a component's state dict; CLIP's without `text_model.`."""
    (file,) = Path(folder, component).glob("*.safetensors")
    return {key.removeprefix("text_model."): x.shape for key, x in load_file(file).items()}


def factors(modules, shapes, *, rank=4, alpha=None, seed=0, size=0.1):
    """By a file's name, up and down and alpha; and by diffusers' key, what they add at scale 1."""
    rng, files, deltas = np.random.default_rng(seed), {}, {}
    for name, parts in modules.items():
        rows = [shapes[f"{part}.weight"][0] for part in parts]
        columns = shapes[f"{parts[0]}.weight"][1]
        up = rng.standard_normal((sum(rows), rank)).astype(np.float32) * np.float32(size)
        down = rng.standard_normal((rank, columns)).astype(np.float32) * np.float32(size)
        files[name] = up, down, alpha
        delta = up @ down * np.float32(1 if alpha is None else alpha / rank)
        if name in SWAPPED:
            delta = np.concatenate([delta[len(delta) // 2 :], delta[: len(delta) // 2]])
        for part, some in zip(parts, np.split(delta, np.cumsum(rows)[:-1]), strict=True):
            deltas[f"{part}.weight"] = some
    return files, deltas


def spelled(files, style, prefix):
    """Tensors of a file: "peft", "kohya", "comfy" or "xlabs" names of factors, after a prefix."""
    down_name, up_name = {
        "peft": ("lora_A", "lora_B"),
        "kohya": ("lora_down", "lora_up"),
        "comfy": ("lora_down", "lora_up"),
        "old": ("lora.down", "lora.up"),
        "xlabs": ("down", "up"),
    }[style]
    tensors = {}
    for name, (up, down, alpha) in files.items():
        module = prefix + (name.replace(".", "_") if style == "kohya" else name)
        tensors |= {f"{module}.{down_name}.weight": down, f"{module}.{up_name}.weight": up}
        if alpha is not None:
            tensors[f"{module}.alpha"] = np.float32(alpha).reshape(())
    return tensors


def by_diffusers(modules):
    """The same matrices by diffusers' own names, unfused."""
    return {part: [part] for parts in modules.values() for part in parts}


def write(path, tensors, said=None):
    """said: PEFT's config, as diffusers' trainers write it."""
    metadata = None if said is None else {"lora_adapter_metadata": json.dumps(said)}
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, path, metadata=metadata)
    return path


def patched(folder, out, deltas, scale=1.0, component="transformer"):
    """A copy of a diffusers folder whose component has W + scale * delta."""
    import shutil

    shutil.copytree(folder, out)
    (file,) = Path(out, component).glob("*.safetensors")
    weights = load_file(file)
    for key, delta in deltas.items():
        full = key if key in weights else f"text_model.{key}"
        weights[full] = weights[full] + np.float32(scale) * delta
    save_file(weights, file)
    return out
