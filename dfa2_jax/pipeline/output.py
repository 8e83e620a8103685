"""What a sampling call returns, and what it says of itself."""

from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from dfa2_jax.pipeline.call import Call

LEFT_OUT = ("progress", "callback_on_step_end", "output_type", "seed", "sigmas", "plan", "attend")
"""Arguments that metadata leaves out, or gives in another form."""


@dataclass(frozen=True)
class Output:
    """Images, and how they came about.

    images: PIL images, or float32 [B, H, W, 3] in [0, 1], or latents as diffusers returns them.
    seeds: one per image, None where the latents were given.
    timings: seconds of encode, denoise, per_step, decode, and of the compilation within them.
    metadata: what would make the same images again; JSON-serialisable.
    faults: what is wrong with which image, in words: numbers that are not finite, or a single value.
    """

    images: Any
    seeds: list[int | None]
    timings: dict[str, float]
    metadata: dict[str, Any] = field(repr=False)
    faults: tuple[str, ...] = ()


def density(call: Call) -> float | None:
    """The kept share of a call's query-key pairs, further forwards of its guidance included.

    None: of an attention of the user's own.
    """
    plan, guidance = call.options.plan, call.inputs.guidance
    if call.options.attend is not None:
        return None
    if plan is None:
        return 1.0
    pairs = sum(layer.layout.length**2 for layer in call.layers)
    every, more = guidance.sides * call.request.steps * pairs, guidance.extra_pairs(call.layers)
    return (plan.density() * every + more) / (every + more) if more else plan.density()


def metadata(call: Call, density: float | None) -> dict[str, Any]:
    """Options as resolved; arrays only by their shape."""
    options, request, pipeline = call.options, call.request, call.pipeline
    values = {one.name: getattr(options, one.name) for one in fields(options)}
    given = {
        name: f"array{list(np.shape(value))}" if name.endswith(("embeds", "latents")) else plain(value)
        for name, value in values.items()
        if value is not None and name not in LEFT_OUT
    }
    resolved = {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.steps,
        "guidance_scale": plain(request.guidance_scale),
        "max_sequence_length": request.length,
        "seed": plain(options.seed) if call.seeds[0] is not None else None,
        "plan": None if options.plan is None else options.plan.digest,
        "density": density,
        "sigmas": None if request.sigmas is None else [float(sigma) for sigma in request.sigmas],
        "pipeline": pipeline.pipeline_class,
        "fingerprint": pipeline.fingerprint,
        "dtype": pipeline.dtype.name,
        "torch_rounding": pipeline.torch_rounding,
        "versions": {"dfa2_jax": version("dfa2-jax"), "jax": jax.__version__},
    }
    if options.attend is not None:
        resolved["attend"] = repr(options.attend)
    return given | resolved


def plain(value: Any) -> Any:
    """As JSON knows it: no NumPy numbers, no tuples."""
    return np.asarray(value).tolist() if isinstance(value, (np.ndarray, np.generic, tuple, list)) else value
