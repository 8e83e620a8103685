"""A denoising step of SD3.5 and FLUX.1-dev against diffusers' on the same GPU: bfloat16, true shapes, random weights.

    python -m benchmarks.rival [CASE ...] [--rounds 5] [--steps 2] [--out benchmarks/results/rival_gpu.json]

Cases are those of benchmarks/sampling.py. diffusers runs eagerly and under `torch.compile` (block by block: blocks of a
kind share what is compiled), with torch's own attention. Ours is the whole jitted loop, with guidance and the Euler
update; diffusers' is the transformer alone, on the same batch. Contenders are timed in turn, and a row holds medians
and the ratio of diffusers' time to ours. benchmarks/forward.py compares outputs too, on a CPU. Needs torch and
diffusers beside a JAX for CUDA.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs a share of the GPU

import diffusers
import jax
import torch

from benchmarks.loops import interleaved, ratio
from benchmarks.machine import describe_machine
from benchmarks.sampling import GPU, Case
from dfa2_jax.io.atomic import write_whole


def build(case: Case) -> Any:
    """diffusers' transformer, with weights drawn on the GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = getattr(diffusers, case.class_name)(**case.config)
    finally:
        torch.set_default_dtype(before)
    return model.to("cuda").eval()  # buffers made of NumPy arrays are elsewhere


def arguments(case: Case, model: Any) -> dict[str, Any]:
    """The arguments of a forward, as diffusers' pipelines give them."""
    batch, flux = 1 + case.guided, case.class_name.startswith("Flux")
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    found = {
        "encoder_hidden_states": draw(batch, case.num_text, model.config.joint_attention_dim),
        "pooled_projections": draw(batch, model.config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5 if flux else 500.0, device="cuda", dtype=torch.bfloat16),
        "return_dict": False,
    }
    if not flux:
        return found | {"hidden_states": draw(batch, 16, 2 * case.grid.rows, 2 * case.grid.columns)}
    row, column = torch.meshgrid(torch.arange(case.grid.rows), torch.arange(case.grid.columns), indexing="ij")
    grid = torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3)
    return found | {
        "hidden_states": draw(batch, case.grid.num_visual, model.config.in_channels),
        "img_ids": grid.to("cuda", torch.bfloat16),
        "txt_ids": torch.zeros(case.num_text, 3, device="cuda", dtype=torch.bfloat16),
        "guidance": torch.full((batch,), 3.5, device="cuda", dtype=torch.bfloat16),
    }


def measure(case: Case, rounds: int, steps: int) -> dict[str, Any]:
    failed = {}
    loop, eager = case(steps + 1), build(case)
    compiled = copy.deepcopy(eager, {id(x): x for x in (*eager.parameters(), *eager.buffers())})  # one set of weights
    for blocks in filter(lambda child: isinstance(child, torch.nn.ModuleList), compiled.children()):
        for block in blocks:
            block.compile()
    inputs = arguments(case, eager)

    def theirs(model: Any) -> None:
        with torch.no_grad():
            for _ in range(steps):
                model(**inputs)
        torch.cuda.synchronize()

    runs: dict[str, Callable[[], Any]] = {"ours": lambda: loop.dense(1, 1 + steps)}
    for name, model in {"diffusers eager": eager, "diffusers torch.compile": compiled}.items():
        try:
            theirs(model)
            runs[name] = partial(theirs, model)
        except Exception as error:  # torch.compile needs a C++ toolchain that works: a row says why it is missing
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    times = interleaved(runs, rounds)
    return {
        "shape": {"visual": loop.num_visual, "text": loop.num_text, "batch": loop.batch, "dtype": str(loop.dtype)},
        "ms_per_step": {name: 1e3 * median(values) / steps for name, values in times.items()},
        "diffusers_over_ours": {name: ratio(times, name, "ours") for name in runs if name != "ours"},
        "failed": failed,
        "seconds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(GPU)}; the file keeps others"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed at a time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rival_gpu.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in GPU]:
        parser.error(f"unknown {unknown}: choose from {list(GPU)}")
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        parser.error("JAX and torch must both see an NVIDIA GPU; on a CPU, run benchmarks.forward.")
    rows = json.loads(args.out.read_text())["rows"] if args.cases and args.out.exists() else {}
    machine = {"machine": describe_machine(), "device": jax.devices()[0].device_kind}
    for name in args.cases or GPU:
        row = rows[name] = machine | measure(GPU[name], args.rounds, args.steps)
        ratios = ", ".join(f"{rival} / ours {value:.2f}" for rival, value in row["diffusers_over_ours"].items())
        print(f"{name}: {row['ms_per_step']['ours']:.1f} ms a step; {ratios} {row['failed'] or ''}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps({"rows": rows}, indent=1) + "\n")
        torch._dynamo.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
