"""The picture of the idea of docs/steps.md: a dense run's way, where a step plan runs the network, how far it strays.

python -m benchmarks.steps_idea_picture [--out docs/steps_idea.png]

One caption by the model in the box and its plan. The plane is that of the dense latents' two largest principal
components.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.steps import ROOT, SHAPE
from dfa2_jax import Pipeline, Plan
from dfa2_jax.io.atomic import replacing

DEMO = ROOT / "dfa2_jax/demo"
CAPTION, SEED = (DEMO / "prompts.txt").read_text().splitlines()[0], 1
DENSE, PLAN, EULER = "#9a9a9a", "#20124d", "#c2352b"

Latents = Float[np.ndarray, "steps values"]


def way(pipeline: Pipeline, plan: Plan) -> Latents:
    """Latents after every node, in float64."""
    latents: list[np.ndarray] = []

    def keep(_: Any, __: int, ___: Any, told: dict[str, Any]) -> dict[str, Any]:
        latents.append(np.asarray(told["latents"], np.float64).ravel())
        return {}

    options = {"num_inference_steps": plan.setting.num_inference_steps, "output_type": "latent", "progress": False}
    pipeline(CAPTION, seed=SEED, plan=plan, callback_on_step_end=keep, **SHAPE, **options)
    return np.stack(latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/steps_idea.png"))
    args = parser.parse_args()
    pipeline, plan = Pipeline.from_pretrained(DEMO / "toy-sd35"), Plan.load(DEMO / "plan.json")
    steps = plan.setting.num_inference_steps
    ways = {
        "dense run": (way(pipeline, Plan.full(plan.setting)), DENSE, range(1, steps + 1)),
        f"step plan, {len(plan.nodes)} nodes": (way(pipeline, plan), PLAN, [*plan.nodes[1:], steps]),
        "Euler on these nodes": (
            way(pipeline, Plan.full(plan.setting, plan.nodes)), EULER, [*plan.nodes[1:], steps],
        ),
    }  # fmt: skip
    dense = ways["dense run"][0]
    centre = dense.mean(0)
    plane = np.linalg.svd(dense - centre, full_matrices=False)[2][:2].T
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, (latents, colour, reached) in ways.items():
        left.plot(
            *((latents - centre) @ plane).T, "o-", color=colour, label=name, markersize=8 if colour == DENSE else 4
        )
        if colour != DENSE:
            exact = dense[np.array(reached) - 1]
            errors = np.linalg.norm(latents - exact, axis=1) / np.linalg.norm(exact, axis=1)
            right.semilogy(reached, 100 * errors, "o-", color=colour, label=name)
    left.set(xlabel="first component", ylabel="second component", title="latents on their way")
    right.set(xlabel="steps of the schedule", ylabel="off the dense run, %", xticks=[0, *range(4, steps + 1, 4)])
    right.set_title("how far from the dense run")
    for node in plan.nodes:
        right.axvline(node, color=PLAN, alpha=0.12)
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(args.out) as file:
        figure.savefig(file, format=args.out.suffix[1:])
    print(args.out)


if __name__ == "__main__":
    main()
