"""One denoising step: our jitted transformer against diffusers' on the same CPU, same weights, same inputs, float32.

    python -m benchmarks.forward [--rounds 5] [--tokens 256 1024 4096] [--out benchmarks/results/forward.json]

Each pair of outputs is verified first. Then the contenders are timed in turn, round by round. A row holds their medians
and the ratio of diffusers' time to ours. Weights are random. Depth is cut and FLUX's width halved, so that a step at
4,096 visual tokens takes seconds on two cores. All blocks are alike, so a ratio of steps is that of the models.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SD3Transformer2DModel
from flax import nnx

from benchmarks.machine import describe_machine
from dfa2_jax.families.flux.positions import rope_table
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.families.sd3.positions import crop_positions
from dfa2_jax.families.sd3.transformer import PositionTable
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.sampling.sinusoid import sinusoid
from dfa2_jax.sampling.tokens import CHANNEL_ROW_COLUMN, ROW_COLUMN_CHANNEL, patchify

MODELS = {
    "SD3.5-like (24 x 64, 2 dual + 2 blocks, 333 text tokens)": (
        SD3Transformer2DModel,
        "StableDiffusion3Pipeline",
        {
            "num_layers": 4,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 96,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        333,
    ),
    "FLUX-like (12 x 128, 1 double + 2 single blocks, 512 text tokens)": (
        FluxTransformer2DModel,
        "FluxPipeline",
        {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 12, "guidance_embeds": True},
        512,
    ),
}


def save_pipeline(folder: Path, pipeline: str, model: Any) -> None:
    """A diffusers folder with nothing but a transformer and a scheduler."""
    model.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": pipeline, "transformer": ["diffusers", type(model).__name__]}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    write_whole(folder / "model_index.json", json.dumps(index))


def load_ours(folder: Path) -> tuple[Any, Any, np.ndarray | None]:
    """graph, parameters, position table."""
    module = open_checkpoint(folder).load("transformer")
    tables = jax.tree.leaves(nnx.pop(module, PositionTable))
    return *nnx.split(module), tables[0] if tables else None


def contenders(model: Any, ours: Any, side: int, num_text: int, compiled: bool) -> dict[str, Callable[[], np.ndarray]]:
    """name -> a whole step on `side` x `side` visual tokens, as [1, V, C] in this model's token order."""
    flux, config = isinstance(model, FluxTransformer2DModel), model.config
    draw = np.random.default_rng(0).standard_normal
    latents = draw((1, 16, 2 * side, 2 * side)).astype(np.float32)
    text = draw((1, num_text, config.joint_attention_dim)).astype(np.float32)
    pooled = draw((1, config.pooled_projection_dim)).astype(np.float32)
    order = CHANNEL_ROW_COLUMN if flux else ROW_COLUMN_CHANNEL
    tokens = patchify(latents, 2, order)

    graph, params, table = ours
    positions = rope_table((16, 56, 56), num_text, side, side) if flux else crop_positions(table, side, side)
    scalars = [sinusoid(np.array([500.0], np.float32)), sinusoid(np.array([3500.0], np.float32)) if flux else None]
    forward = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args))
    inputs = jax.device_put((tokens, text, pooled, positions, *scalars))

    batch = {"encoder_hidden_states": torch.tensor(text), "pooled_projections": torch.tensor(pooled)}
    if flux:
        grid = np.stack(np.meshgrid(0, np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 3)
        batch |= {"img_ids": torch.tensor(grid), "txt_ids": torch.zeros(num_text, 3), "guidance": torch.tensor([3.5])}
    timestep = torch.tensor([0.5 if flux else 500.0])

    def theirs(module: Any) -> np.ndarray:
        with torch.no_grad():
            hidden = torch.tensor(tokens if flux else latents)
            out = module(hidden, timestep=timestep, return_dict=False, **batch)[0].numpy()
        return out if flux else patchify(out, 2, order)

    rivals = {"ours": lambda: np.asarray(forward(params, *inputs)), "diffusers eager": partial(theirs, model)}
    if compiled:
        torch._dynamo.reset()
        rivals["diffusers torch.compile"] = partial(theirs, torch.compile(model))
    return rivals


def measure(rivals: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, Any]:
    """Median seconds of each, taken in turn; the first call of each (compilation) is checked, not timed."""
    row: dict[str, Any] = {"seconds": {}, "all": {}, "failed": {}}
    outputs = {}
    for name, run in list(rivals.items()):
        try:
            outputs[name] = run()
        except Exception as error:  # torch.compile needs a C++ toolchain that works: a row says why it is missing
            row["failed"][name] = f"{type(error).__name__}: {error}"[:300]
            del rivals[name]
    row["relative_error"] = {
        name: float(np.linalg.norm(outputs["ours"] - out) / np.linalg.norm(out)) for name, out in outputs.items()
    }
    if max(row["relative_error"].values()) > 1e-4:
        raise AssertionError(f"outputs differ, nothing was timed: {row['relative_error']}")
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    row["all"], row["seconds"] = times, {name: median(values) for name, values in times.items()}
    row["diffusers_over_ours"] = {
        name: median(t / o for t, o in zip(values, times["ours"], strict=True))
        for name, values in times.items()
        if name != "ours"
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="visual tokens, squares")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/forward.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, (cls, pipeline, config, num_text) in MODELS.items():
        model = cls(**config).eval()
        with tempfile.TemporaryDirectory() as folder:
            save_pipeline(Path(folder), pipeline, model)
            ours = load_ours(Path(folder))
        for tokens in args.tokens:
            rivals = contenders(model, ours, round(tokens**0.5), num_text, not args.no_compile)
            row = {"model": name, "visual_tokens": tokens, **measure(rivals, args.rounds)}
            rows.append(row)
            ratios = ", ".join(f"{rival} / ours {ratio:.2f}" for rival, ratio in row["diffusers_over_ours"].items())
            print(f"{name}, {tokens} visual tokens: {row['seconds']['ours']:.2f} s; {ratios} {row['failed'] or ''}")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.out, json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
