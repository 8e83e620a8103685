"""What a call of the pipeline asks for, checked and with every default filled in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfa2_jax.families.base import Embeddings
from dfa2_jax.families.flux.family import Flux
from dfa2_jax.families.sd3.family import SD3

MAX_SEQUENCE_LENGTH = 512
OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one side of the guidance: texts for every encoder, or ready embeddings."""

    texts: list[list[str]] | None
    embeddings: Embeddings | None

    @property
    def count(self) -> int:
        return len(self.embeddings.text if self.texts is None else self.texts[0])  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked call. `scale` is the guidance of a doubled batch, None for one forward per image."""

    positive: Prompts
    negative: Prompts | None
    height: int
    width: int
    steps: int
    sigmas: Sequence[float] | np.ndarray | None
    guidance_scale: float
    scale: float | None
    images_per_prompt: int
    length: int
    clip_skip: int
    skip_layers: list[int] | None
    output_type: str

    @property
    def batch(self) -> int:
        return self.positive.count * self.images_per_prompt


def resolve(args: dict[str, Any], family: SD3 | Flux, multiple: int, default_size: int, num_layers: int) -> Request:
    """Check the arguments of `Pipeline.__call__` against the model and each other, before any work.

    Raises:
        ValueError: names the arguments and shows their values.
    """
    if args["output_type"] not in OUTPUT_TYPES:
        raise ValueError(f"output_type={args['output_type']!r} is not one of {OUTPUT_TYPES}.")
    defaults = family.defaults
    guidance_scale = _number("guidance_scale", _or(args["guidance_scale"], defaults.guidance_scale))
    for name in ("true_cfg_scale", *(f"skip_layer_guidance_{part}" for part in ("scale", "start", "stop"))):
        _number(name, args[name])
    has_negative = args["negative_prompt"] is not None or args["negative_prompt_embeds"] is not None
    scale = family.guidance(guidance_scale, args["true_cfg_scale"], has_negative)
    positive = _prompts(args, family, "")
    negative = None if scale is None else _negative(args, family, positive)
    height, width = (_positive_int(name, _or(args[name], default_size)) for name in ("height", "width"))
    height, width = family.size(height, width, multiple)
    length = _positive_int("max_sequence_length", _or(args["max_sequence_length"], defaults.max_sequence_length))
    if length > MAX_SEQUENCE_LENGTH:
        raise ValueError(f"max_sequence_length={length} exceeds {MAX_SEQUENCE_LENGTH}.")
    return Request(
        positive=positive,
        negative=negative,
        height=height,
        width=width,
        steps=_steps(args, defaults.num_inference_steps),
        sigmas=args["sigmas"],
        guidance_scale=guidance_scale,
        scale=scale,
        images_per_prompt=_positive_int("num_images_per_prompt", args["num_images_per_prompt"]),
        length=length,
        clip_skip=_clip_skip(args["clip_skip"], family),
        skip_layers=_skip_layers(args["skip_guidance_layers"], family, num_layers, scale),
        output_type=args["output_type"],
    )


def seeds_of(seed: int | list[int], batch: int) -> list[int]:
    """One seed per image of the batch; an int is repeated, since it draws all of them."""
    values = np.asarray(seed)
    if values.ndim > 1 or not np.issubdtype(values.dtype, np.integer) or (values < 0).any():
        raise ValueError(f"seed={seed!r} must be an integer, or one integer per image, none negative.")
    seeds = [int(one) for one in (values if values.ndim else [values] * batch)]
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for a batch of {batch} images: pass an int or one seed per image.")
    return seeds


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer.")
    return int(value)


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number.")
    return value  # as it came: the metadata shows it


def _steps(args: dict[str, Any], default: int) -> int:
    if args["sigmas"] is None:
        return _positive_int("num_inference_steps", _or(args["num_inference_steps"], default))
    steps = np.size(args["sigmas"])
    if np.ndim(args["sigmas"]) != 1 or not steps:
        raise ValueError(f"sigmas={args['sigmas']!r} must be a list of numbers in (0, 1].")
    if args["num_inference_steps"] not in (None, steps):
        raise ValueError(
            f"num_inference_steps={args['num_inference_steps']} but {steps} sigmas: leave one of them out."
        )
    return steps


def _clip_skip(clip_skip: int | None, family: SD3 | Flux) -> int:
    if clip_skip is not None and (
        not isinstance(family, SD3) or not isinstance(clip_skip, (int, np.integer)) or clip_skip < 0
    ):
        raise ValueError(
            f"{clip_skip=} must be an integer of 0 or more, and is for SD3 only: FLUX reads CLIP's pooled state."
        )
    return clip_skip or 0


def _skip_layers(layers: list[int] | None, family: SD3 | Flux, count: int, scale: float | None) -> list[int] | None:
    """Skip-layer guidance pushes the guided velocity: as in diffusers, without guidance there is none."""
    if layers is None:
        return None
    if not isinstance(family, SD3):
        raise ValueError(f"skip_guidance_layers={layers} is for SD3 only: FLUX has no skip-layer guidance.")
    if np.ndim(layers) != 1 or not np.issubdtype(np.asarray(layers, None if len(layers) else int).dtype, np.integer):
        raise ValueError(f"skip_guidance_layers={layers!r} must be a list of layer numbers.")
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"skip_guidance_layers={layers}: {outside} are not among the model's {count} layers.")
    return None if scale is None else layers


def _texts(args: dict[str, Any], family: SD3 | Flux, prefix: str) -> list[list[str]] | None:
    """[texts of encoder 1, of encoder 2, ...]; a later encoder takes the first's prompt when it has none."""
    names = [f"{prefix}prompt", f"{prefix}prompt_2", f"{prefix}prompt_3"]
    for name in names[family.num_prompts :]:
        if args[name] is not None:
            raise ValueError(f"{name} is not None, but this model has {family.num_prompts} text encoders.")
    first = args[names[0]]
    if first is None:
        for name in names[1:]:
            if args[name] is not None:
                raise ValueError(f"{name}={args[name]!r} needs {names[0]} too.")
        return None
    texts = []
    for name in names[: family.num_prompts]:
        value = args[name] or first  # as diffusers: an empty second prompt is the first one
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{name}={value!r} must be a string or a list of strings, not empty.")
        for text in value:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}={text!r} is not valid text: {error.reason}.") from error
        texts.append(value)
    if len({len(value) for value in texts}) > 1:
        counts = dict(zip(names, map(len, texts), strict=False))
        raise ValueError(f"All prompts must be as many: {counts}.")
    return texts


def _prompts(args: dict[str, Any], family: SD3 | Flux, prefix: str) -> Prompts:
    texts, embeddings = _texts(args, family, prefix), _embeddings(args, family, prefix)
    if (texts is None) == (embeddings is None):
        raise ValueError(f"Pass either {prefix}prompt or {prefix}prompt_embeds: {'both' if texts else 'neither'} came.")
    return Prompts(texts=texts, embeddings=embeddings)


def _negative(args: dict[str, Any], family: SD3 | Flux, positive: Prompts) -> Prompts:
    """The other side of the guidance: "" when nothing was passed, one negative prompt for all when it is a string."""
    args = dict(args)
    if args["negative_prompt"] is None and args["negative_prompt_embeds"] is None:
        args["negative_prompt"] = ""
    for name in ("negative_prompt", "negative_prompt_2", "negative_prompt_3"):
        if isinstance(args[name], str):
            args[name] = [args[name]] * positive.count
    negative = _prompts(args, family, "negative_")
    if negative.count != positive.count:
        raise ValueError(f"{negative.count} negative prompts for {positive.count} prompts: pass one, or one for each.")
    return negative


def _embeddings(args: dict[str, Any], family: SD3 | Flux, prefix: str) -> Embeddings | None:
    names = f"{prefix}prompt_embeds", f"{prefix}pooled_prompt_embeds"
    given = [args[name] is not None for name in names]
    if not any(given):
        return None
    if not all(given):
        raise ValueError(f"{names[0]} and {names[1]} go together: {names[given.index(False)]} is None.")
    text, pooled = (np.asarray(args[name]) for name in names)
    config = family.config
    if text.ndim != 3 or text.shape[2] != config.joint_attention_dim or not text.size:
        raise ValueError(f"{names[0]} must be [batch, tokens, {config.joint_attention_dim}], got {list(text.shape)}.")
    if pooled.shape != (len(text), config.pooled_projection_dim):
        want = [len(text), config.pooled_projection_dim]
        raise ValueError(f"{names[1]} must be {want}, got {list(pooled.shape)}.")
    return Embeddings(text, pooled)
