"""Images of the model in the box with blocks of 8 bits, against float32's, beside bfloat16's.

    python -m benchmarks.quantized [--prompts 64] [--batch 16] [--out benchmarks/results/quantized_toy.json]

Captions are held out, 20 steps, 256 px, guidance 4. Results are kept after every row.
"""

import argparse
import json
from pathlib import Path

import jax

from benchmarks.machine import describe_machine
from benchmarks.steps import ROOT, SHAPE, sample, summary
from dfa2_jax import Pipeline
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.weights.dtypes import PRECISIONS
from toy.scenes import held_out


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
    rows = []
    for dtype in ("bfloat16", *PRECISIONS):
        pipeline = Pipeline.from_pretrained(args.folder, dtype=dtype)
        rows.append({"dtype": dtype} | summary(sample(pipeline, prompts, 1, args.batch, **shape), exact))
        write_whole(args.out, json.dumps(machine | {"rows": rows}, indent=1) + "\n")
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
