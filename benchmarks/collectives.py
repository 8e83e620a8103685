"""What several H200s of one host exchange in a step of the planned loop, and what they keep, found without a GPU.

    JAX_PLATFORMS=cpu python3.12 -m benchmarks.collectives [CASE ...] [--devices 2 4 8]

Compiles `dfa2_jax.sampling.loop.denoise_planned` and reads the program. A row has the exchanges of the dense first step
and of one by a plan, which are at most as large. Where devices share no tokens, a plan's step is compiled in two ways,
and both count. A row has the bytes that a device sends in a dense step, too, and the memory of each device. `made_anew`
counts the operations that copy a stack of memory: there must be none.

Predicted milliseconds are those of one GPU over the devices, and the exchange at a rate. A rate is that of NVLink as
collectives usually reach it, or what two H200s did at 2048 px with packing. It takes about 15 minutes.
`pallas_kernels.inspect.aot` says what must be installed.
"""

import argparse
import json
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from pallas_kernels.inspect.hlo import Collective, collectives, num_bytes, uses_of_stacks
from tests.real_shapes import compile_planned

ONE_GPU = {"FLUX.1-dev 1024": 127.0, "FLUX.1-dev 2048": 679.0, "SD3.5-large 2048": 731.0}
"""Milliseconds of a dense step on one H200, random weights (`benchmarks.multigpu`); SD3.5-large is guided."""

RATES = {"nvlink": 350e9, "measured": 103.8e6 / 0.72e-3}
"""Bytes a second that each device sends. Measured: a layer of FLUX.1-dev at 2048 px on two H200s, there and back."""


def counts(found: list[Collective]) -> dict[str, int]:
    """By kind."""
    return dict(sum((Counter({one.kind: one.times}) for one in found), Counter()))


def largest_copy(hlo: str) -> int:
    """Bytes; copies inside of fusions, which have no buffer, count too.

    SD3.5-large on 2 x 1 copies zeros, in place of the queries, keys and values of a layer whose heads are all cached.
    They are as large as the stack of its last block, which is one layer.
    """
    shapes = re.findall(r" = ([a-z]\w*\[[\d,]*\])\S* copy\(", hlo)
    return max((num_bytes(shape) for shape in shapes), default=0)


def measure(case: str, devices: int) -> dict[str, Any]:
    jax.clear_caches()
    model, pixels = case.split()
    mesh, memory, compiled = compile_planned(model, int(pixels), devices)
    shares = {name: x.sharding.shard_shape(x.shape) for name, x in memory.items()}
    stacks = {f"bf16[{','.join(map(str, share))}]" for share in shares.values()}
    made_anew, _ = uses_of_stacks(compiled.hlo, stacks)
    found = collectives(compiled.hlo, unknown=1)
    dense, planned = ([one for one in found if one.in_loop == in_loop] for in_loop in (False, True))
    sent = sum(one.sent_bytes for one in dense)
    exchange = {name: 1e3 * sent / rate for name, rate in RATES.items()}
    return {
        "mesh": [mesh.rows, mesh.tokens],
        "dense": counts(dense),
        "planned_at_most": counts(planned),
        "sent_bytes": sent,
        "planned_sent_bytes_at_most": sum(one.sent_bytes for one in planned),
        "exchange_ms": exchange,
        "one_gpu_ms": ONE_GPU[case],
        "step_ms": {name: ONE_GPU[case] / devices + ms for name, ms in exchange.items()},
        "memory_bytes": sum(map(num_bytes, sorted(stacks))),
        "alias_bytes": compiled.alias_bytes,
        "argument_bytes": compiled.argument_bytes,
        "temp_bytes": compiled.temp_bytes,
        "made_anew": dict(made_anew),
        "largest_copy_bytes": largest_copy(compiled.hlo),
        "smallest_stack_bytes": min(map(num_bytes, stacks)),
        "compile_seconds": compiled.lower_seconds + compiled.compile_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(ONE_GPU)}")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/collectives.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in ONE_GPU]:
        parser.error(f"unknown {unknown}: choose from {list(ONE_GPU)}")
    plugins = {name: version(name) for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13")}
    record: dict[str, Any] = {"target": "h200", "machine": describe_machine(), "plugins": plugins, "rates": RATES}
    record["rows"] = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    for case in args.cases or ONE_GPU:
        for devices in args.devices:
            row = measure(case, devices)
            record["rows"].setdefault(case, {})[str(devices)] = row
            print(f"{case} px, {devices}: {json.dumps(row)}", flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
