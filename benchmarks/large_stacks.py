"""Attention whose memory has more than 2^31 numbers: a layer's output there against the same call without a stack.

    python -m benchmarks.large_stacks [--out benchmarks/results/large_stacks_gpu.json]

CogVideoX1.5-5B at 81 x 768 x 1360: 42 layers, 1.2e10 numbers, 23 GB in bfloat16. A third of the heads is cached, the
others are arrows. The first, a middle and the last layer must be equal to the bit, and all others untouched. One JSON
row for each implementation; exit code 1 if one is wrong. On a CPU the stack is small.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from pallas_kernels import CACHED, Layout, arrow_attention

ON_GPU = jax.default_backend() == "gpu"
LAYOUT = Layout(226, 11 * 48 * 85, True) if ON_GPU else Layout(6, 120, True)
LAYERS, BATCH, HEADS, HEAD_DIM = (42, 2, 48, 64) if ON_GPU else (3, 2, 6, 16)
IMPLEMENTATIONS = ("mosaic", "triton") if ON_GPU else ("blockwise",)


def check(implementation: str) -> dict[str, Any]:
    shape = BATCH, LAYOUT.length, HEADS, HEAD_DIM
    q, k, v, before = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    window = jnp.full(HEADS, LAYOUT.num_visual // 32, jnp.int32).at[::3].set(CACHED)
    attend = partial(arrow_attention, layout=LAYOUT, implementation=implementation)
    alone = jax.jit(attend)(q, k, v, window, cache=before)

    @partial(jax.jit, donate_argnums=0)
    def fill(stack: jax.Array, layer: jax.Array) -> jax.Array:
        return stack.at[layer].set(before)

    run = jax.jit(attend, donate_argnames="cache")
    same = jax.jit(lambda stack, layer, expected: (stack[layer] == expected).all())
    stack, layers = jnp.zeros((LAYERS, *shape), jnp.bfloat16), {0, LAYERS // 2, LAYERS - 1}
    for layer in layers:
        stack = run(q, k, v, window, cache=fill(stack, jnp.int32(layer)), layer=jnp.int32(layer))
    equal = {layer: bool(same(stack, jnp.int32(layer), alone)) for layer in sorted(layers)}
    zeros = jnp.zeros(shape, jnp.bfloat16)
    untouched = all(bool(same(stack, jnp.int32(layer), zeros)) for layer in {*range(LAYERS)} - layers)
    return {"numbers": stack.size, "equal": equal, "others_untouched": untouched}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/large_stacks_{jax.default_backend()}.json")
    )
    args = parser.parse_args()
    rows = {name: check(name) for name in IMPLEMENTATIONS}
    content = {"machine": describe_machine(), "device": jax.devices()[0].device_kind, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, json.dumps(content, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    return not all(all(x["equal"].values()) and x["others_untouched"] for x in rows.values())


if __name__ == "__main__":
    raise SystemExit(main())
