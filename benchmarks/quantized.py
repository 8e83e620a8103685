"""Images of the model in the box with blocks of 8 bits, against float32's, beside bfloat16's.

    python -m benchmarks.quantized [--prompts 64] [--batch 16] [--out benchmarks/results/quantized_toy.json]

Each precision has a row, and each kind of layer in float8. Captions are held out, 20 steps, 256 px, guidance 4. Results
are kept after every row.
"""

import argparse
import json
from pathlib import Path

import jax

from benchmarks.machine import describe_machine
from benchmarks.steps import ROOT, SHAPE, sample, summary
from dfa2_jax import Pipeline
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.nn import quantize
from dfa2_jax.weights.dtypes import PRECISIONS
from toy.scenes import held_out

CHOICES = (("to_qkv",), ("to_out",), ("up",), ("to_qkv", "to_out", "up", "down"))
"""Kinds of layers in float8 where the others are int8, beside those of the precisions."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "dfa2_jax/demo/toy-sd35")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quantized_toy.json")
    args = parser.parse_args()
    prompts = [scene.caption for scene in held_out()][: args.prompts]
    shape = SHAPE | {"num_inference_steps": 20}
    exact = sample(Pipeline.from_pretrained(args.folder, dtype="float32"), prompts, 1, args.batch, **shape)
    machine = {"device": jax.devices()[0].device_kind, "machine": describe_machine(), "prompts": len(prompts)}
    rows, shipped = [], quantize.FLOAT8
    named = [(dtype, None) for dtype in ("bfloat16", *PRECISIONS)]
    for dtype, kinds in (*named, *(("float8", kinds) for kinds in CHOICES)):
        quantize.FLOAT8 = shipped if kinds is None else {"float8": kinds}
        pipeline = Pipeline.from_pretrained(args.folder, dtype=dtype)
        kept = summary(sample(pipeline, prompts, 1, args.batch, **shape), exact)
        rows.append({"dtype": dtype, "in_float8": kinds} | kept)
        write_whole(args.out, json.dumps(machine | {"rows": rows}, indent=1) + "\n")
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
