"""Converting and loading FLUX-shaped folders of 6 and 12 GB: time, and peak of anonymous memory.

    python -m benchmarks.convert [--rounds 3] [--blocks 5,9 10,18] [--folder DIR] [--out results.json]

The folders are made on the spot: FLUX.1-dev's true shapes in bfloat16, fewer blocks, normal values. Every measurement
is a process of its own, watched from outside: RssAnon of /proc/PID/status every 20 ms. Pages of mapped files can be
dropped at any time and do not count. Its source has just been read, so lies in the page cache as far as it fits, and
everything written before has been synced. Contenders take turns, round by round:

    plain write         as many bytes from one buffer to one file, and fsync: what the disk gives at that moment
    convert             `convert_checkpoint`, with its fsync
    convert float32     the same with dtype="float32": every weight is cast, twice the bytes are written
    orbax               a plain Orbax save, `use_ocdbt=False` and else its defaults (which compress with zstd), of the
                        same number of bytes in arrays of the same shapes that lie in memory before the clock starts
    orbax uncompressed  the same with `use_compression=False`, which is what `convert` writes
    load diffusers      `open_checkpoint(...).load("transformer", "bfloat16")` of the diffusers folder
    load converted      the same of the converted folder, compared with its checksums, and `unchecked`

Orbax holds all arrays in memory (twice while it saves), so it runs at the smallest size only, as does float32.
GB and GB/s count the bytes of the source.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import replacing, write_whole

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHARD_BYTES = 5_000_000_000
ALONE = {"plain write": ".plain", "convert float32": ".float32", "orbax": ".orbax", "orbax uncompressed": ".orbax"}
"""Contenders whose output nobody reads, and its suffix."""
WIDTH, HEAD, MLP, TEXT, POOLED, CHANNELS = 3072, 128, 12288, 4096, 768, 64  # FLUX.1-dev


def dense(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def shapes_of(double: int, single: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of FLUX.1-dev's transformer with this many blocks, as diffusers saves it."""
    shapes = dense("x_embedder", WIDTH, CHANNELS) | dense("context_embedder", WIDTH, TEXT)
    for name, size in (("timestep", 256), ("guidance", 256), ("text", POOLED)):
        shapes |= dense(f"time_text_embed.{name}_embedder.linear_1", WIDTH, size)
        shapes |= dense(f"time_text_embed.{name}_embedder.linear_2", WIDTH, WIDTH)
    for i in range(double):
        at = f"transformer_blocks.{i}."
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes |= dense(f"{at}attn.{name}", WIDTH, WIDTH)
        shapes |= {f"{at}attn.norm_{name}.weight": (HEAD,) for name in ("q", "k", "added_q", "added_k")}
        for norm, ff in (("norm1", "ff"), ("norm1_context", "ff_context")):
            shapes |= dense(f"{at}{norm}.linear", 6 * WIDTH, WIDTH)
            shapes |= dense(f"{at}{ff}.net.0.proj", MLP, WIDTH) | dense(f"{at}{ff}.net.2", WIDTH, MLP)
    for i in range(single):
        at = f"single_transformer_blocks.{i}."
        for name in ("to_q", "to_k", "to_v"):
            shapes |= dense(f"{at}attn.{name}", WIDTH, WIDTH)
        shapes |= {f"{at}attn.norm_{name}.weight": (HEAD,) for name in ("q", "k")}
        shapes |= dense(f"{at}norm.linear", 3 * WIDTH, WIDTH) | dense(f"{at}proj_mlp", MLP, WIDTH)
        shapes |= dense(f"{at}proj_out", WIDTH, WIDTH + MLP)
    return shapes | dense("norm_out.linear", 2 * WIDTH, WIDTH) | dense("proj_out", CHANNELS, WIDTH)


def values() -> Iterator[np.ndarray]:
    """Endless bfloat16 of a normal distribution, 32 MB at a time, cut anew each time: zstd sees no repetition."""
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(2**24, np.float32)).astype(BFLOAT16)
    while True:
        cut = int(rng.integers(1, len(pool)))
        yield pool[cut:]
        yield pool[:cut]


def fill(size: int, source: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Parts of `size` values in all."""
    while size:
        part = next(source)[:size]
        size -= len(part)
        yield part


def write_folder(folder: Path, double: int, single: int) -> int:
    """A diffusers folder of a transformer and a scheduler. Returns the bytes of its weights."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    config = {"num_layers": double, "num_single_layers": single, "num_attention_heads": WIDTH // HEAD}
    config |= {"attention_head_dim": HEAD, "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
    config |= {"in_channels": CHANNELS, "patch_size": 1, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56]}
    write_whole(folder / "model_index.json", json.dumps(index))
    write_whole(folder / "transformer" / "config.json", json.dumps(config))
    write_whole(
        folder / "scheduler" / "scheduler_config.json", json.dumps({"shift": 3.0, "use_dynamic_shifting": True})
    )

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    taken = total = 0
    for key, shape in shapes_of(double, single).items():
        nbytes = math.prod(shape) * BFLOAT16.itemsize
        if taken + nbytes > SHARD_BYTES:
            shards.append({})
            taken = 0
        shards[-1][key] = shape
        taken, total = taken + nbytes, total + nbytes
    weight_map, source = {}, values()
    for number, shard in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / "transformer" / name, shard, source)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_whole(folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json", json.dumps(index))
    return total


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], source: Iterator[np.ndarray]) -> None:
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * BFLOAT16.itemsize
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for part in fill(math.prod(shape), source):
                file.write(part.view(np.uint8).data)


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon of a process; 0 where it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found.group(1)) * 1024 if found else 0


def save_with_orbax(folder: Path, target: Path, **options: Any) -> tuple[float, int]:
    """Seconds of a plain save of arrays that lie in memory as our stacked parameters do; bytes of the arrays."""
    import orbax.checkpoint as ocp

    from dfa2_jax.families.registry import open_checkpoint

    source, tree = values(), {}
    for path, leaf in open_checkpoint(folder).leaves("transformer").items():
        array = np.empty(leaf.shape, leaf.dtype)
        flat, at = array.reshape(-1), 0
        for part in fill(array.size, source):
            flat[at : at + len(part)] = part
            at += len(part)
        tree[".".join(map(str, path))] = array
    start = time.perf_counter()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, **options)) as checkpointer:
        checkpointer.save(target, tree)
    return time.perf_counter() - start, sum(array.nbytes for array in tree.values())


def write_plainly(target: Path, nbytes: int) -> None:
    buffer = next(values()).view(np.uint8).data[: 2**24]
    with target.open("wb", buffering=0) as file:
        while nbytes > 0:
            nbytes -= file.write(buffer)
        os.fsync(file.fileno())


def child(contender: str, folder: Path, target: Path) -> dict[str, Any]:
    """One measurement, in the process that makes it."""
    import jax

    from dfa2_jax.conversion import convert_checkpoint
    from dfa2_jax.families.registry import FAMILIES  # what a load imports counts as "before"
    from dfa2_jax.weights.open import open_folder

    jax.device_put(np.zeros(8)).block_until_ready()  # the backend is up, as in any process that uses JAX
    row: dict[str, Any] = {"before": anonymous_bytes()}
    start, cpu_start = time.perf_counter(), time.process_time()
    if contender == "plain write":
        write_plainly(target, sum(path.stat().st_size for path in folder.rglob("*.safetensors")))
    elif contender.startswith("convert"):
        convert_checkpoint(folder, target, dtype="float32" if "float32" in contender else None)
    elif contender.startswith("orbax"):
        options = {"use_compression": False} if "uncompressed" in contender else {}
        row["seconds"], row["arrays"] = save_with_orbax(folder, target, **options)
    else:
        source = folder if "diffusers" in contender else target
        model = open_folder(source, FAMILIES, verify="unchecked" not in contender).load("transformer", "bfloat16")
        arrays = jax.block_until_ready(jax.tree.leaves(model))
        row["arrays"] = sum(array.nbytes for array in arrays)
    row.setdefault("seconds", time.perf_counter() - start)
    return row | {"cpu_seconds": time.process_time() - cpu_start}


def measure(contender: str, folder: Path, target: Path) -> dict[str, Any]:
    """`child` in a fresh process, with the peak of its anonymous memory seen from here."""
    if not contender.startswith("orbax"):
        warm(target if contender.startswith("load converted") else folder)
    os.sync()
    command = [sys.executable, "-m", "benchmarks.convert", "--child", contender, str(folder), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert process.stdout is not None
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{contender} ended with {process.returncode}")
    row = json.loads(process.stdout.read().splitlines()[-1])
    return row | {"peak": peak, "load_average": os.getloadavg()[0]}


def warm(folder: Path) -> None:
    """Read every file once, so that the page cache holds it."""
    buffer = bytearray(2**24)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def summarise(contender: str, nbytes: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary = {
        "contender": contender,
        "weights_gb": round(nbytes / 1e9, 2),
        "seconds": median(row["seconds"] for row in rows),
        "gb_per_second": median(nbytes / 1e9 / row["seconds"] for row in rows),
        "peak_anonymous_gb": median(row["peak"] / 1e9 for row in rows),
        "before_gb": median(row["before"] / 1e9 for row in rows),
        "rounds": rows,
    }
    if "arrays" in rows[0]:
        above = (row["peak"] - row["before"] - row["arrays"] for row in rows)
        summary["peak_above_arrays_gb"] = median(value / 1e9 for value in above)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", nargs="+", default=["5,9", "10,18"], help="double,single blocks of each size")
    parser.add_argument("--folder", type=Path, help="where to make the folders (default: the temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/convert.json"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], *map(Path, args.child[1:]))))
        return
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        sizes = []
        for number, blocks in enumerate(args.blocks):
            folder = Path(temporary) / f"flux{number}"
            sizes.append((folder, write_folder(folder, *map(int, blocks.split(",")))))
        for _ in range(args.rounds):
            for folder, nbytes in sizes:
                contenders = ["convert", "load diffusers", "load converted", "load converted unchecked", "plain write"]
                if nbytes == min(size for _, size in sizes):
                    contenders += ["convert float32", "orbax", "orbax uncompressed"]
                for contender in contenders:
                    target = folder.with_suffix(ALONE.get(contender, ".converted"))
                    row = measure(contender, folder, target)
                    results.setdefault((contender, nbytes), []).append(row)
                    print(f"{contender:20} {nbytes / 1e9:6.2f} GB  {json.dumps(row)}", flush=True)
                    if contender in ALONE:
                        target.unlink() if target.is_file() else shutil.rmtree(target)
                shutil.rmtree(folder.with_suffix(".converted"))
            report(results, args.out)


def report(results: dict[tuple[str, int], list[dict[str, Any]]], out: Path) -> None:
    """Write and print the medians of the rounds so far."""
    rows = [summarise(contender, nbytes, found) for (contender, nbytes), found in results.items()]
    layer = max(math.prod(shape) * BFLOAT16.itemsize for shape in shapes_of(1, 1).values())
    content = {"machine": describe_machine(), "page_cache": "warm", "largest_layer_gb": layer / 1e9, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(content, indent=1) + "\n")
    print(f"\nmedians; largest layer {layer / 1e9:.3f} GB\n{'':20}     GB  seconds   GB/s  peak GB  above arrays GB")
    for row in rows:
        above = f"{row['peak_above_arrays_gb']:.3f}" if "peak_above_arrays_gb" in row else ""
        numbers = f"{row['weights_gb']:6.2f} {row['seconds']:8.1f} {row['gb_per_second']:6.2f}"
        print(f"{row['contender']:20} {numbers} {row['peak_anonymous_gb']:8.3f}  {above}", flush=True)


if __name__ == "__main__":
    main()
