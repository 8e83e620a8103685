"""Decoding videos of the published sizes: seconds until the first frames and until all, and the peak memory.

    python -m benchmarks.video_vae [CASE ...] [--rounds 3] [--out FILE]

CogVideoX's autoencoder, and HunyuanVideo's, with random weights, which time like real ones. Frames come to the host, as
a call has them. The peak is what XLA plans for the program that needs most, with all that it is given. Results are kept
after every case, in benchmarks/results/video_vae_<platform>.json.
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
from dfa2_jax.pipeline.components import Component, call, call_carrying
from dfa2_jax.pipeline.decoding import chunks_of, frames_of, parts_of, seen_by
from dfa2_jax.vae.hunyuan import AutoencoderKLHunyuanVideo, HunyuanAutoencoderConfig
from dfa2_jax.vae.tiles import Tiles
from dfa2_jax.vae.video import AutoencoderKLCogVideoX, VideoAutoencoderConfig


class Case(NamedTuple):
    """Latent frames and pixels, and the autoencoder's dtype.

    is_tiled: a frame is decoded in tiles.
    """

    frames: int
    height: int
    width: int
    dtype: Any = jnp.bfloat16
    config: VideoAutoencoderConfig | HunyuanAutoencoderConfig = VideoAutoencoderConfig()
    is_tiled: bool = False


HUNYUAN = HunyuanAutoencoderConfig()
GPU = {
    "49 x 480 x 720": Case(13, 60, 90),
    "81 x 768 x 1360": Case(21, 96, 170),
    "HunyuanVideo 129 x 720 x 1280": Case(33, 90, 160, config=HUNYUAN),
    "HunyuanVideo 129 x 720 x 1280, tiles": Case(33, 90, 160, config=HUNYUAN, is_tiled=True),
}
CPU = {
    "17 x 96 x 96": Case(5, 12, 12, jnp.float32, VideoAutoencoderConfig(block_out_channels=(32, 32, 64, 64))),
}


def random_vae(case: Case) -> Component:
    is_cogvideox = isinstance(case.config, VideoAutoencoderConfig)
    build: Any = AutoencoderKLCogVideoX if is_cogvideox else AutoencoderKLHunyuanVideo
    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(case.config, dtype=case.dtype, rngs=nnx.Rngs(0))))
    return Component(nnx.merge(graph, random_like(shapes)))


def tiles_of(case: Case) -> Tiles | None:
    return case.config.tiles() if case.is_tiled else None


def peak_gb(vae: Component, latents: np.ndarray, tiles: Tiles | None) -> dict[str, float]:
    """What a later chunk's program needs with all that it is given. All but the first and the last are alike."""
    first, second, *_ = chunks_of(vae, latents)
    part, *_ = parts_of(latents, tiles)
    z, returned = seen_by(first, latents, part), None
    lowered = call.lower(vae.graph, vae.params, z, method=first.method)
    if second.takes_cache:
        _, returned = vae.compile(z, method=first.method).returned
        z = seen_by(second, latents, part)
        lowered = call_carrying.lower(vae.graph, vae.params, z, returned, method=second.method)
    memory = lowered.compile().memory_analysis()
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "peak_gb": (given + memory.temp_size_in_bytes) / 1e9,
        "weights_gb": sum(x.nbytes for x in jax.tree.leaves(vae.params)) / 1e9,
        "cache_gb": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(returned)) / 1e9,
    }


def decode(vae: Component, latents: np.ndarray, tiles: Tiles | None) -> tuple[float, float, int]:
    """Seconds until the first frames, until all, and how many they are."""
    started, first, count = time.perf_counter(), 0.0, 0
    for frames in frames_of(vae, latents, jax.device_put, tiles):
        count += len(frames)
        first = first or time.perf_counter() - started
    return first, time.perf_counter() - started, count


def measure(case: Case, rounds: int) -> dict[str, Any]:
    vae, tiles = random_vae(case), tiles_of(case)
    latents = np.random.default_rng(0).standard_normal((case.frames, case.height, case.width, 16), np.float32)
    memory = peak_gb(vae, latents, tiles)
    started = time.perf_counter()
    *_, count = decode(vae, latents, tiles)
    compiling = time.perf_counter() - started
    firsts, wholes, _ = zip(*(decode(vae, latents, tiles) for _ in tqdm(range(rounds))), strict=True)
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
