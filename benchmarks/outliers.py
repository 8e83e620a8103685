"""What 8 bits cost each kind of layer: errors of single products, by how values share scales.

    python -m benchmarks.outliers [--out benchmarks/results/outliers.json]

Activations are those of the model in the box at three noise levels: four held-out captions, guidance 4. Others are of
blocks of FLUX.1-dev and SD3.5-large, with random weights at their widths. Errors are relative to the float32 product. A
row of activations and a channel of weights share a scale, or 128 values of either do. Or both are first rotated by
Hadamard matrices of 128, which spread an outlier.
"""

import argparse
import json
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.machine import describe_machine
from benchmarks.steps import ROOT, SHAPE
from dfa2_jax import Pipeline
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.nn.attention import BlockAttention, Dense, LayerPlan
from dfa2_jax.nn.blocks import JointBlock, SingleBlock
from dfa2_jax.nn.linear import MLP, Linear, gelu_tanh
from dfa2_jax.nn.streams import Context, Projections
from dfa2_jax.nn.weights import merge_heads
from pallas_kernels.backends.passes import quantized_rows
from pallas_kernels.layout import Layout
from toy.scenes import held_out

BLOCK = 128
DTYPES = {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}
SIGMAS = (1.0, 0.5, 0.1)
ROWS = 512
"""Tokens of a product that are judged, at most."""


def hadamard() -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(np.float32(BLOCK))


def rounded(x: jax.Array, dtype: Any, blocks: bool = False) -> jax.Array:
    """Rows through 8 bits and back."""
    rows = x.reshape(len(x), -1, BLOCK) if blocks else x
    values, scale = quantized_rows(rows, dtype)
    return (values.astype(jnp.float32) * scale[..., None]).reshape(x.shape)


@jax.jit
def errors(x: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
    """By choice, the relative error of x [M, D] times the kernel [D, E]."""
    weights = kernel.T
    product = lambda a, b: jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    exact, result = product(x, weights), {}
    turned = [(a.reshape(len(a), -1, BLOCK) @ hadamard()).reshape(a.shape) for a in (x, weights)]
    for name, dtype in DTYPES.items():
        pairs = {
            f"{name}": (rounded(x, dtype), rounded(weights, dtype)),
            f"{name}, blocks": (rounded(x, dtype, True), rounded(weights, dtype, True)),
            f"{name}, Hadamard": tuple(rounded(one, dtype) for one in turned),
        }
        for choice, (a, b) in pairs.items():
            result[choice] = jnp.linalg.norm(product(a, b) - exact) / jnp.linalg.norm(exact)
    return result


class Watch:
    """Judges the products of every block that runs while it is entered; nothing may be jitted."""

    def __init__(self):
        self.errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.peaks: dict[str, list[float]] = defaultdict(list)

    def judge(self, kind: str, x: jax.Array, *linears: Linear) -> None:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        rows = rows[:: max(1, len(rows) // ROWS)]
        kernel = jnp.concatenate([linear.weight.kernel[...] for linear in linears], axis=1)  # type: ignore[attr-defined]
        with jax.disable_jit(False):
            for choice, error in errors(rows, kernel.astype(jnp.float32)).items():
                self.errors[kind][choice].append(float(error))
        largest = jnp.abs(rows).max(axis=1) / jnp.sqrt(jnp.square(rows).mean(axis=1) + 1e-30)
        self.peaks[kind].append(float(jnp.median(largest)))

    def __enter__(self) -> "Watch":
        watch, qkv, out, mlp = self, Projections.qkv, Projections.out, MLP.__call__

        def watched_qkv(self: Projections, x: Any, heads: Any = None) -> Any:
            watch.judge("to_qkv", x, self.to_q, self.to_k, self.to_v)
            return qkv(self, x, heads)

        def watched_out(self: Projections, heads: Any) -> Any:
            assert self.to_out is not None
            watch.judge("to_out", merge_heads(heads), self.to_out)
            return out(self, heads)

        def watched_mlp(self: MLP, x: Any) -> Any:
            if self.activation is gelu_tanh:
                watch.judge("up", x, self.up)
                watch.judge("down", self.activation(self.up(x)), self.down)
            return mlp(self, x)

        self._stack = ExitStack()
        self._stack.enter_context(jax.disable_jit())
        for owner, name, function in (
            (Projections, "qkv", watched_qkv), (Projections, "out", watched_out), (MLP, "__call__", watched_mlp),
        ):  # fmt: skip
            self._stack.enter_context(patch.object(owner, name, function))
        return self

    def __exit__(self, *args: Any) -> None:
        self._stack.close()

    def rows(self) -> dict[str, Any]:
        """By kind of layer: mean and worst error of each choice. "peak" is a token's largest value over its root mean
        square: the median of a product's tokens, the largest of all products."""
        return {
            kind: {choice: [mean(values), max(values)] for choice, values in of_kind.items()}
            | {"peak": max(self.peaks[kind])}
            for kind, of_kind in self.errors.items()
        }


def toy() -> dict[str, Any]:
    pipeline = Pipeline.from_pretrained(ROOT / "dfa2_jax/demo/toy-sd35", dtype="float32")
    prompts = [scene.caption for scene in held_out()][:4]
    call = SHAPE | {"output_type": "latent", "progress": False}
    noise = np.random.default_rng(0).standard_normal((4, *pipeline_latents(pipeline))).astype(np.float32)
    images = np.asarray(pipeline(prompts, latents=noise, num_inference_steps=10, **call).images)
    watch = Watch()
    for sigma in SIGMAS:
        latents = sigma * noise + (1 - sigma) * images
        with watch:
            pipeline(prompts, latents=latents, sigmas=[sigma], num_inference_steps=1, **call)
    return watch.rows()


def pipeline_latents(pipeline: Pipeline) -> tuple[int, int, int]:
    side = SHAPE["height"] // pipeline.sizes.vae_scale
    return pipeline.config.in_channels, side, side


def random_blocks(width: int, heads: int, single: bool) -> dict[str, Any]:
    """One joint block, and one single block where `single`, of tokens with normal values."""
    layout = Layout(num_text=64, num_visual=192, text_first=single)
    keys = jax.random.split(jax.random.key(0), 3)
    visual, text, vector = (jax.random.normal(k, (1, n, width)) for k, n in zip(keys, (192, 64, 1), strict=True))
    options: dict[str, Any] = {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    context = Context(vector[:, 0], layout)

    def attention() -> BlockAttention:
        return BlockAttention(Dense(), "", {}, {"attn": LayerPlan(jnp.int32(0), jnp.int32(0))})

    with Watch() as watch:
        visual, text = JointBlock(width, heads, qk_norm=True, **options)(visual, text, context, attention())
        if single:
            joined = jnp.concatenate([text, visual], axis=1)
            SingleBlock(width, heads, **options)(joined, context, attention())
    return watch.rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/outliers.json")
    args = parser.parse_args()
    rows = {
        "model in the box": toy(),
        "FLUX.1-dev, random": random_blocks(3072, 24, True),
        "SD3.5-large, random": random_blocks(2432, 38, False),
    }
    write_whole(args.out, json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    for model, kinds in rows.items():
        for kind, one in kinds.items():
            print(model, kind, {name: np.round(value, 4).tolist() for name, value in one.items()})


if __name__ == "__main__":
    main()
