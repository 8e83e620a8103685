"""The first minute: seconds from a clone to the demo's first image and to its end, with nothing in any cache.

    python -m benchmarks.first_minute [--out benchmarks/results/first_minute.json]

Clones the repository as it is committed, and runs `make demo` there with empty caches of pip and of compiled programs.
Then `dfa2 demo` runs in an environment with a wheel in place of the checkout, first with an empty cache of programs.
pip downloads from the index that it is configured for. Other work on the machine counts: `load_average` says how much.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from dfa2_jax.io.atomic import write_whole

ROOT = Path(__file__).parent.parent


def watch(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Seconds to the first path of an image on stdout, and to the end.

    Raises:
        CalledProcessError: the command fails.
    """
    started, load, first, images = time.perf_counter(), os.getloadavg()[0], None, 0
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if line.endswith(".png\n") and (folder / line.strip()).is_file():
                images += 1
                first = first or time.perf_counter() - started
    if process.returncode or first is None:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = {"first_image": round(first, 1), "end": round(time.perf_counter() - started, 1)}
    return {"seconds": seconds, "images": images - 1, "load_average": round(load, 2)}  # the last one is the picture


def measure(folder: Path) -> dict[str, Any]:
    """In a folder that holds nothing yet: the machine with the demo's own versions, and a row for each command."""
    clone, caches = folder / "clone", {"XDG_CACHE_HOME": str(folder / "cache"), "PIP_CACHE_DIR": str(folder / "pip")}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | caches
    started = time.perf_counter()
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    cloned = time.perf_counter() - started
    rows = {"make demo": watch(["make", "demo"], clone, environment)}
    rows["make demo"]["seconds"] = {
        "clone": round(cloned, 1),
        **{name: round(cloned + value, 1) for name, value in rows["make demo"]["seconds"].items()},
    }
    python = clone / ".venv-demo" / "bin" / "python"
    tell = "import json; from benchmarks.machine import describe_machine; print(json.dumps(describe_machine()))"
    machine = json.loads(subprocess.run([python, "-c", tell], cwd=clone, check=True, capture_output=True).stdout)
    wheel = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(clone)]
    subprocess.run([python, *wheel], check=True, env=environment)
    (file,) = folder.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", file], check=True, env=environment)
    environment["XDG_CACHE_HOME"] = str(folder / "second cache")
    for name in ("dfa2 demo", "dfa2 demo, again"):
        rows[name] = watch([str(python.with_name("dfa2")), "demo"], folder, environment)
    return {"machine": machine, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/first_minute.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        content = measure(Path(folder))
    write_whole(args.out, json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
