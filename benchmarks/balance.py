"""How unequal the attention of several devices is, by how a plan's heads are dealt to them.

    python -m benchmarks.balance [--keep 0.32] [--steps 28]

A number is the slowest device's tiles, summed over steps and layers, over the mean device's: 1 where nobody waits.
Plans are random (`benchmarks.loops.random_plan`): no head of a published model was calibrated here. They draw heads
anew at each step, where a fixed dealing gains least; heads that keep their method would let it gain more. The first
step is dense and not counted. Devices are those of one row of the mesh; a guided image may have two rows, and so twice
as many. Heads are dealt in these ways:

- contiguous: each device has its heads for good, in the order of the model;
- fixed: for good, too, in each layer by what heads cost over all steps;
- anew: at each step and in each layer (`parallel.dealing.deal`);
- bound: no dealing is faster than the mean, or than the most expensive head.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from benchmarks.loops import random_plan
from benchmarks.machine import describe_machine
from benchmarks.sampling import GPU
from dfa2_jax import Plan
from dfa2_jax.families.registry import networks
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.parallel.dealing import costs_of, deal, hands

CASES = ("FLUX.1-dev 2048", "SD3.5-large 2048")
DEVICES = (2, 4, 8)
REUSE = {"mixed": 0.5, "reuse": 1.0, "arrows": 0.0}
"""The share of a plan's saving that is by cached heads."""

Costs = Float[np.ndarray, "steps layers N"]
Slowest = Float[np.ndarray, "steps layers"]


def costs_of_plan(plan: Plan) -> Costs:
    """Tiles of every head after the first step."""
    windows, layers = plan.half_windows()[1:], plan.setting.layers
    return np.stack([costs_of(windows[:, number], layer.layout) for number, layer in enumerate(layers)], axis=1)


def dealt(costs: Float[np.ndarray, " N"], devices: int) -> Int[np.ndarray, "devices count"]:
    """Each device's heads; numbers past the last head are of padding."""
    order = deal(costs, devices)
    count = next(count for count in hands(len(order) // devices) if count * devices >= np.count_nonzero(costs))
    return order[: count * devices].reshape(devices, count)


def slowest(
    costs: Float[np.ndarray, "*steps N"], heads: Int[np.ndarray, "devices count"]
) -> Float[np.ndarray, "*steps"]:
    """Tiles of the device that has most."""
    padding = [(0, 0)] * (costs.ndim - 1) + [(0, max(0, int(heads.max(initial=0)) + 1 - costs.shape[-1]))]
    return np.pad(costs, padding)[..., heads].sum(-1).max(-1)


def contiguous(costs: Costs, devices: int) -> Slowest:
    owner = np.arange(costs.shape[2]) * devices // costs.shape[2]
    return np.stack([costs[:, :, owner == device].sum(2) for device in range(devices)]).max(0)


def fixed(costs: Costs, devices: int) -> Slowest:
    layers = np.moveaxis(costs, 1, 0)
    return np.stack([slowest(layer, dealt(layer.sum(0), devices)) for layer in layers], axis=1)


def anew(costs: Costs, devices: int) -> Slowest:
    return np.array([[slowest(layer, dealt(layer, devices)) for layer in step] for step in costs])


def bound(costs: Costs, devices: int) -> Slowest:
    return np.maximum(costs.sum(2) / devices, costs.max(2))


DEALINGS: dict[str, Callable[[Costs, int], Slowest]] = {
    "contiguous": contiguous,
    "fixed": fixed,
    "anew": anew,
    "bound": bound,
}


def measure(name: str, keep: float, steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """By plan, devices and dealing: the slowest device's tiles over the mean."""
    case = GPU[name]
    config = networks()[case.class_name].config(case.config)
    calls, found = config.calls(case.num_text, case.grid.num_visual), {}
    for kind, reuse in REUSE.items():
        costs = costs_of_plan(random_plan(config, calls, steps, 1 + case.guided, keep, reuse=reuse))
        found[kind] = {
            str(devices): {
                dealing: float(of(costs, devices).sum() / (costs.sum() / devices)) for dealing, of in DEALINGS.items()
            }
            for devices in DEVICES
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.32, help="the share of pairs that the plans keep")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/balance.json"))
    args = parser.parse_args()
    started = time.perf_counter()
    rows = {name: measure(name, args.keep, args.steps) for name in CASES}
    record = {"machine": describe_machine(), "keep": args.keep, "steps": args.steps, "rows": rows}
    record["run_seconds"] = time.perf_counter() - started
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, json.dumps(record, indent=1) + "\n")
    for name, kinds in rows.items():
        for kind, found in kinds.items():
            for devices, dealings in found.items():
                print(name, kind, devices, " ".join(f"{one}={value:.3f}" for one, value in dealings.items()))
    print(f"{record['run_seconds']:.0f} s")


if __name__ == "__main__":
    main()
