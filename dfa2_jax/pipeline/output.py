"""What a sampling call returns, and what it says of itself."""

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from dfa2_jax.pipeline.request import Request
from dfa2_jax.plan.plan import Plan
from dfa2_jax.sampling.loop import SkipGuidance

UNTOLD = ("progress", "callback_on_step_end", "output_type", "seed", "sigmas", "plan")
"""Arguments that metadata leaves out, or gives in another form."""


@dataclass(frozen=True)
class Output:
    """Images, and how they came about.

    images: PIL images, or float32 [B, H, W, 3] in [0, 1], or latents as diffusers returns them.
    seeds: one per image, None where the latents were given.
    timings: seconds of encode, denoise, per_step, decode, and of the compilation within them.
    metadata: what would make the same images again; JSON-serialisable.
    """

    images: Any
    seeds: list[int | None]
    timings: dict[str, float]
    metadata: dict[str, Any] = field(repr=False)


def density(plan: Plan | None, skip: SkipGuidance | None) -> float:
    """The kept share of a call's query-key pairs: of the plan, and of skip-layer guidance's forwards, dense ones of
    the conditional half of the batch without some blocks."""
    if plan is None:
        return 1.0
    if skip is None:
        return plan.density()
    pairs = [layer.layout.length**2 for layer in plan.setting.layers]
    skipped = [bool(skip.layers[int(layer.name.split(".")[1])]) for layer in plan.setting.layers]
    more = int(np.sum(skip.active)) * sum(np.array(pairs)[~np.array(skipped)].tolist())
    every = 2 * plan.setting.num_inference_steps * sum(pairs)
    return (plan.density() * every + more) / (every + more)


def metadata(
    pipeline: Any, args: dict[str, Any], request: Request, seeds: list[int | None], density: float
) -> dict[str, Any]:
    """Arguments as resolved; arrays only by their shape."""
    given = {
        name: f"array{list(np.shape(value))}" if name.endswith(("embeds", "latents")) else plain(value)
        for name, value in args.items()
        if value is not None and name not in UNTOLD
    }
    resolved = {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.steps,
        "guidance_scale": plain(request.guidance_scale),
        "max_sequence_length": request.length,
        "seed": plain(args["seed"]) if seeds[0] is not None else None,
        "plan": None if args["plan"] is None else args["plan"].digest,
        "density": density,
        "sigmas": None if request.sigmas is None else [float(sigma) for sigma in request.sigmas],
        "pipeline": pipeline.pipeline_class,
        "fingerprint": pipeline.fingerprint,
        "dtype": pipeline.dtype.name,
        "torch_rounding": pipeline.torch_rounding,
        "versions": {"dfa2_jax": version("dfa2-jax"), "jax": jax.__version__},
    }
    return given | resolved


def plain(value: Any) -> Any:
    """As JSON knows it: no NumPy numbers, no tuples."""
    return np.asarray(value).tolist() if isinstance(value, (np.ndarray, np.generic, tuple, list)) else value
