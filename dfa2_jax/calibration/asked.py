"""The call that a calibration runs, and what its file says of it."""

from typing import Any

import jax

from dfa2_jax import __version__
from dfa2_jax.io.digest import digest_of
from dfa2_jax.options import CalibrationOptions, Options
from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.pipeline import Pipeline
from dfa2_jax.pipeline.timing import told


def prepared(pipeline: Pipeline, prompts: list[str], options: CalibrationOptions, arguments: dict[str, Any]) -> Call:
    """All prompts in one batch, encoded.

    Raises:
        ValueError: as in a call, or a negative prompt or `true_cfg_scale` has no effect, or it starts from a picture.
    """
    with told("encoding", options.progress):
        call = pipeline.prepare(asked(prompts, options, arguments))
    if call.inputs.known is not None or call.request.first:
        raise ValueError("image= is for FLUX.1-Fill and -Kontext: leave it out. Plans from noise serve pictures, too.")
    negative, true_cfg_scale = call.options.negative_prompt, call.options.true_cfg_scale
    if call.request.cfg_scale is None and (negative is not None or true_cfg_scale != 1):
        raise ValueError(
            f"negative_prompt={negative!r:.100} and {true_cfg_scale=} have no effect with guidance_scale="
            f"{call.request.guidance_scale:g}. FLUX.1 and HunyuanVideo need both, the scale above 1; others need "
            "guidance_scale above 1."
        )
    return call


def asked(prompts: list[str], options: CalibrationOptions, arguments: dict[str, Any]) -> Options:
    """The call that is calibrated."""
    return Options(prompt=prompts, seed=options.seed, output_type="latent", **arguments)


def facts_of(prompts: list[str], call: Call) -> dict[str, Any]:
    """How a plan is found, as its file says it."""
    texts: dict[str, Any] = {"prompts": prompts, "negative_prompt": call.options.negative_prompt}
    if call.request.source is not None:
        texts["source"] = call.request.source.digest
    return {
        "prompts_sha256": digest_of(texts),
        "num_prompts": len(prompts),
        "seed": call.options.seed,
        "guidance_scale": call.request.guidance_scale,
        "true_cfg_scale": call.options.true_cfg_scale,
        "dtype": call.pipeline.dtype.name,
        "versions": {"dfa2_jax": __version__, "jax": jax.__version__},
    }


def digest_of_all(call: Call, facts: dict[str, Any]) -> str:
    """The digest of all that a calibration's findings depend on."""
    setting = call.setting.content()
    return digest_of(facts | {"setting": setting, "rounding": call.pipeline.rounding})
