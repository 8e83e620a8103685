"""Whether what a call made can be images at all."""

from typing import Any

import numpy as np

from dfa2_jax.pipeline.call import Call


def faults_of(call: Call, tokens: np.ndarray, images: Any) -> tuple[str, ...]:
    """What is wrong with which image, in words; nothing where every image has finite numbers of more than one value.

    Args:
        tokens: patchified latents [B, V, P] after all steps.
        images: as `Call.images` makes them.
    """
    faults, what = [], "image" if call.request.num_frames is None else "video"
    broken = [not np.isfinite(latents).all() for latents in tokens]
    step = first_broken_step(call) if any(broken) else None
    for number, (latents, image) in enumerate(zip(tokens, images, strict=True)):
        if broken[number]:
            since = "" if step is None else f" from step {step + 1} of {call.num_steps(call.plan)} on"
            faults.append(f"{what} {number}: its latents are not finite{since}")
        elif latents.min() == latents.max():
            faults.append(f"{what} {number}: its latents are the constant {latents.min():g}")
        elif not np.isfinite(pixels := np.asarray(image, np.float32)).all():
            faults.append(f"{what} {number}: the autoencoder makes numbers of its latents that are not finite")
        elif (pixels == pixels.reshape(-1, pixels.shape[-1])[0]).all():
            faults.append(f"{what} {number}: every pixel is the same")
    return tuple(faults)


def first_broken_step(call: Call) -> int | None:
    """The first step whose latents are not finite, by running the call again, step by step; None where a callback had
    a hand in it."""
    if call.options.callback_on_step_end is not None:
        return None
    run, state = call.program(call.plan)
    for step in range(call.num_steps(call.plan)):
        state = run(state, step, step + 1)
        if not np.isfinite(np.asarray(state.latents)).all():
            return step
    return None
