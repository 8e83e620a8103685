"""Decoding videos of the published sizes: seconds until the first frames and until all, and the peak memory.

    python -m benchmarks.video_vae [CASE ...] [--rounds 3] [--out FILE]

CogVideoX's autoencoder with random weights, which time like real ones. Frames come to the host, as a call has them.
The peak is what XLA plans for the program of a later chunk, with all that it is given. Results are kept after every
case, in benchmarks/results/video_vae_<platform>.json.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from benchmarks.loops import random_like
from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.pipeline.components import Component, call_carrying
from dfa2_jax.pipeline.decoding import chunks_of, frames_of
from dfa2_jax.vae.video import AutoencoderKLCogVideoX, VideoAutoencoderConfig


class Case(NamedTuple):
    """Latent frames and pixels, and the autoencoder's dtype."""

    frames: int
    height: int
    width: int
    dtype: Any = jnp.bfloat16
    config: VideoAutoencoderConfig = VideoAutoencoderConfig()


GPU = {"49 x 480 x 720": Case(13, 60, 90), "81 x 768 x 1360": Case(21, 96, 170)}
CPU = {
    "17 x 96 x 96": Case(5, 12, 12, jnp.float32, VideoAutoencoderConfig(block_out_channels=(32, 32, 64, 64))),
}


def random_vae(case: Case) -> Component:
    module = nnx.eval_shape(lambda: AutoencoderKLCogVideoX(case.config, dtype=case.dtype, rngs=nnx.Rngs(0)))
    graph, shapes = nnx.split(module)
    return Component(nnx.merge(graph, random_like(shapes)))


def peak_gb(vae: Component, latents: np.ndarray) -> dict[str, float]:
    """By program, what it needs with all that it is given."""
    first, later, *_ = chunks_of(vae, latents)
    _, carried = vae.compile(first[None], method="decode_first").returned
    lowered = call_carrying.lower(vae.graph, vae.params, later[None], carried, method="decode_next")
    memory = lowered.compile().memory_analysis()
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "peak_gb": (given + memory.temp_size_in_bytes) / 1e9,
        "weights_gb": sum(x.nbytes for x in jax.tree.leaves(vae.params)) / 1e9,
        "cache_gb": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(carried)) / 1e9,
    }


def decode(vae: Component, latents: np.ndarray) -> tuple[float, float, int]:
    """Seconds until the first frames, until all, and how many they are."""
    started, first, count = time.perf_counter(), 0.0, 0
    for frames in frames_of(vae, latents, jax.device_put):
        count += len(frames)
        first = first or time.perf_counter() - started
    return first, time.perf_counter() - started, count


def measure(case: Case, rounds: int) -> dict[str, Any]:
    vae = random_vae(case)
    latents = np.random.default_rng(0).standard_normal((case.frames, case.height, case.width, 16), np.float32)
    memory = peak_gb(vae, latents)
    started = time.perf_counter()
    *_, count = decode(vae, latents)
    compiling = time.perf_counter() - started
    firsts, wholes, _ = zip(*(decode(vae, latents) for _ in tqdm(range(rounds))), strict=True)
    return memory | {
        "frames": count,
        "dtype": jnp.dtype(case.dtype).name,
        "first_call_s": compiling,
        "first_frames_s": median(firsts),
        "decode_s": median(wholes),
        "seconds": wholes,
    }


def main() -> None:
    platform = jax.default_backend()
    cases = CPU if platform == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(cases)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/video_vae_{platform}.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in cases]:
        parser.error(f"unknown {unknown}: choose from {list(cases)}")
    rows = json.loads(args.out.read_text())["rows"] if args.cases and args.out.exists() else {}
    machine = {"machine": describe_machine(), "device": jax.devices()[0].device_kind}
    for name in args.cases or cases:
        rows[name] = machine | measure(cases[name], args.rounds)
        print(f"{name}: {json.dumps({k: v for k, v in rows[name].items() if k not in machine})}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
