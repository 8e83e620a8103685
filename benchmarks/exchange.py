"""The exchange of tokens for heads around attention, alone: as the library has it, and as others could.

    python -m benchmarks.exchange [CASE ...] [--devices 2] [--rounds 3]

A layer's queries, keys and values go there, and the output comes back. A rate is what each device sends, over the time
of both ways. "permutes" sends each other device its part by an exchange of its own, and nothing to itself. (Of two
devices' data, an all-to-all copies half from a device to itself.) "apart" exchanges queries, keys and values alone, and
leaves tokens in the order in which devices have them. Full attention needs no other where nothing is padded.
"packing" is the library's exchange without sending.
Each is run 20 times in one program. On a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from benchmarks.loops import interleaved
from benchmarks.machine import describe_machine
from benchmarks.sampling import CPU, GPU, Case
from dfa2_jax.families.registry import networks
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.parallel.mesh import TOKENS, DeviceMesh
from dfa2_jax.parallel.ulysses import Exchange

REPEATS = 20


class Permutes(Exchange):
    def swapped(self, x: Array) -> Array:
        me, parts = lax.axis_index(TOKENS), jnp.int32(self.parts)
        received = [lax.dynamic_index_in_dim(x, me, keepdims=False)]
        for shift in range(1, self.parts):
            sent = lax.dynamic_index_in_dim(x, lax.rem(me + shift, parts), keepdims=False)
            pairs = [(i, (i + shift) % self.parts) for i in range(self.parts)]
            received.append(lax.ppermute(sent, TOKENS, pairs))
        places = lax.rem(me - jnp.arange(self.parts, dtype=jnp.int32) + parts, parts)
        return jnp.stack(received)[places]


class Apart(Exchange):
    def to_heads(self, *arrays: Array) -> list[Array]:
        def swapped(x: Array) -> Array:
            x = x.reshape(*x.shape[:2], self.parts, -1, x.shape[-1])
            x = jnp.moveaxis(self.swapped(jnp.moveaxis(x, 2, 0)), 0, 1)  # [B, device, own, heads, H]
            return x.reshape(len(x), -1, *x.shape[3:])

        return [swapped(x) for x in arrays]

    def to_tokens(self, x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(len(x), self.parts, -1, *x.shape[2:]), 1, 0)
        x = jnp.moveaxis(self.swapped(x), 0, 2)  # [B, own, device, heads, H]
        return x.reshape(*x.shape[:2], -1, x.shape[-1])


class Packing(Exchange):
    def swapped(self, x: Array) -> Array:
        return lax.optimization_barrier(x)


WAYS = {"all-to-all": Exchange, "permutes": Permutes, "apart": Apart, "packing": Packing}


def measure(case: Case, devices: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a layer's exchange there and back by each way, and what each device sends."""
    config = networks()[case.class_name].config(case.config)
    calls = config.calls(case.num_text, case.grid.num_visual)
    layout = max((call.layout for call in calls), key=lambda layout: layout.length)
    mesh = DeviceMesh.of(jax.devices()[:devices], 1)
    heads, spec = -(-config.num_attention_heads // devices) * devices, P(None, TOKENS)
    shape = (1, mesh.padded_length(layout), heads, config.attention_head_dim)
    drawn = np.random.default_rng(0).standard_normal(shape, np.float32).astype(jnp.dtype(case.dtype))
    x = jax.device_put(drawn, NamedSharding(mesh.devices, spec))

    def compiled(way: str) -> Callable[[], Array]:
        swap = WAYS[way](devices, layout, mesh.share(layout))

        def both(x: Array) -> Array:
            q, k, v = lax.optimization_barrier(tuple(swap.to_heads(x, x + 1, x + 2)))
            return swap.to_tokens(0.5 * q - k + v)

        def many(x: Array) -> Array:
            return lax.fori_loop(0, REPEATS, lambda _, x: lax.optimization_barrier(both(x)), x)

        mapped = jax.shard_map(many, mesh=mesh.devices, in_specs=spec, out_specs=spec, check_vma=False)
        return partial(jax.jit(mapped).lower(x).compile(), x)

    is_padded = mesh.padded_length(layout) > layout.length
    runs = {way: compiled(way) for way in WAYS if way != "apart" or not is_padded}
    results = {way: np.asarray(run(), np.float32) for way, run in runs.items() if way != "packing"}
    for way, result in results.items():
        np.testing.assert_array_equal(result, results["all-to-all"], err_msg=way)
    times = interleaved(runs, rounds)
    ms = {way: 1e3 * median(values) / REPEATS for way, values in times.items()}
    sent = 4 * x.nbytes / devices * (devices - 1) / devices
    return {"ms": ms, "sent_mb": sent / 1e6, "gb_per_s": {way: sent / 1e6 / ms[way] for way in ms if way != "packing"}}


def main() -> None:
    platform = jax.default_backend()
    cases = CPU if platform == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(cases)}")
    parser.add_argument("--devices", type=int, nargs="+", default=[jax.device_count()])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/exchange_{platform}.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in cases]:
        parser.error(f"unknown {unknown}: choose from {list(cases)}")
    content: dict[str, Any] = {"device": jax.devices()[0].device_kind, "machine": describe_machine(), "rows": {}}
    for name in args.cases or cases:
        content["rows"][name] = {str(count): measure(cases[name], count, args.rounds) for count in args.devices}
        print(f"{name}: {json.dumps(content['rows'][name])}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
