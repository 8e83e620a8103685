"""What checksums cost: digests on one core, and a converted folder loaded with and without its checks.

    python -m benchmarks.checksums [--blocks 1,1] [--rounds 3] [--out benchmarks/results/checksums.json]

Seconds are the CPU's, of all threads, so that other work on the machine counts little; files lie in the page cache.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.convert import measure, write_folder
from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole

DIGESTS: dict[str, Callable[[bytes], Any]] = {
    "crc32": zlib.crc32,
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
}


def speed(digest: Callable[[bytes], Any], data: bytes, rounds: int) -> float:
    """GB for each second of the CPU, the median."""
    rates = []
    for _ in range(rounds):
        start = time.process_time()
        digest(data)
        rates.append(1e-9 * len(data) / (time.process_time() - start))
    return round(median(rates), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="1,1", help="double,single blocks of a FLUX-shaped folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checksums.json"))
    args = parser.parse_args()
    data = os.urandom(2**26)
    digests = {name: speed(digest, data, 5) for name, digest in DIGESTS.items()}
    rows: dict[str, list[dict[str, Any]]] = {"load converted": [], "load converted unchecked": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder, target = Path(temporary) / "flux", Path(temporary) / "converted"
        nbytes = write_folder(folder, *map(int, args.blocks.split(",")))
        conversion = measure("convert", folder, target)
        for _ in range(args.rounds):
            for contender, found in rows.items():
                found.append(measure(contender, folder, target))
    content = {
        "machine": describe_machine(),
        "weights_gb": round(nbytes / 1e9, 2),
        "digests_gb_per_cpu_second": digests,
        "convert_cpu_seconds": conversion["cpu_seconds"],
        "rows": {
            name: {key: median(row[key] for row in found) for key in ("seconds", "cpu_seconds", "load_average")}
            for name, found in rows.items()
        },
    }
    write_whole(args.out, json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
