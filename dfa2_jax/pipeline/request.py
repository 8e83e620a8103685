"""What a call of the pipeline asks for, checked and with every default filled in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import numpy as np

from dfa2_jax.families.base import Defaults, Embeddings, Family
from dfa2_jax.io.arrays import host_array
from dfa2_jax.options import Options
from dfa2_jax.pipeline.source import Source, source_of, steps_left_out
from dfa2_jax.sampling.solvers.schedulers import check_settings, named_config

MAX_SEQUENCE_LENGTH = 512
MAX_SIDE, MAX_STEPS, MAX_IMAGES, MAX_FRAMES, MAX_FPS = 16384, 1000, 1000, 10_000, 1000
"""Bounds of a call, looked at before anything is made of its size. Models are trained with 1,000 noise levels."""
MAX_PIXELS = 2**32
"""The most of all images of a call. Each is 12 bytes as it is decoded, which makes 52 GB."""
MAX_SCALE = 1e4
"""The largest scale of guidance. FLUX embeds 1,000 times the scale, and far above, the sinusoid loses its phase in
float32."""

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
class ModelSizes:
    """Sizes of the loaded model that a request is checked against.

    vae_scale: image pixels along a side of one latent pixel.
    multiple: image pixels along a side of one token.
    image: pixels where a call says nothing, height and width.
    num_frames: of a video where a call says nothing; None: the model makes images.
    """

    vae_scale: int
    multiple: int
    image: tuple[int, int]
    num_frames: int | None
    num_layers: int
    joint_attention_dim: int
    pooled_projection_dim: int | None
    """None: the model takes no pooled text."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked call.

    cfg_scale: the guidance of a doubled batch; None: one forward per image.
    source: the picture that sampling starts from; None: noise.
    strength: share of the noise that the picture starts with. first: the step of the schedule that it starts at.
    """

    positive: Prompts
    negative: Prompts | None
    height: int
    width: int
    num_frames: int | None
    latent_frames: int
    fps: int | None
    steps: int
    scheduler: Mapping[str, Any]
    sigmas: Sequence[float] | np.ndarray | None
    guidance_scale: float
    cfg_scale: float | None
    images_per_prompt: int
    length: int
    clip_skip: int
    output_type: str
    source: Source | None = None
    strength: float | None = None
    first: int = 0

    @property
    def batch(self) -> int:
        return self.positive.count * self.images_per_prompt

    @property
    def encodes_text(self) -> bool:
        """Whether a text encoder runs, for one side of the guidance at least."""
        return any(side is not None and side.texts is not None for side in (self.positive, self.negative))


def resolve(options: Options, family: Family, sizes: ModelSizes, scheduler: Mapping[str, Any]) -> Request:
    """Check a call against the model and its arguments against each other, before any work.

    Args:
        scheduler: the folder's, where the call names no other.

    Raises:
        ValueError: names the arguments and shows their values.
    """
    if options.output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={options.output_type!r} is not one of {OUTPUT_TYPES}.")
    defaults = family.defaults
    guidance_scale = _number("guidance_scale", _or(options.guidance_scale, defaults.guidance_scale))
    for name in ("true_cfg_scale", *(f"skip_layer_guidance_{part}" for part in ("scale", "start", "stop"))):
        _number(name, getattr(options, name))
    family.check(options)
    cfg_scale = family.cfg_scale(options, guidance_scale)
    if options.use_dynamic_cfg and cfg_scale is None and defaults.num_frames is not None:
        raise ValueError(f"use_dynamic_cfg has no effect: there is no guidance at {guidance_scale=}.")
    positive = _prompts(options, family, sizes, "")
    negative = None if cfg_scale is None else _negative(options, family, sizes, positive)
    height, width = (
        _positive_int(name, _or(getattr(options, name), own), MAX_SIDE)
        for name, own in zip(("height", "width"), sizes.image, strict=True)
    )
    height, width = family.size(height, width, sizes.multiple)
    num_frames, fps = _video(options, defaults)
    _check_watcher(options.callback_on_frames, num_frames, options.output_type)
    length = _positive_int(
        "max_sequence_length", _or(options.max_sequence_length, defaults.max_sequence_length), MAX_SEQUENCE_LENGTH
    )
    _check_skipped(options.skip_guidance_layers, sizes.num_layers)
    request = Request(
        positive=positive,
        negative=negative,
        height=height,
        width=width,
        num_frames=num_frames,
        latent_frames=family.latent_frames(num_frames),
        fps=fps,
        steps=_steps(options, defaults.num_inference_steps),
        scheduler=_scheduler(options.scheduler, family, scheduler),
        sigmas=options.sigmas,
        guidance_scale=guidance_scale,
        cfg_scale=cfg_scale,
        images_per_prompt=_positive_int("num_images_per_prompt", options.num_images_per_prompt, MAX_IMAGES),
        length=length,
        clip_skip=_clip_skip(options.clip_skip),
        output_type=options.output_type,
    )
    request = _from_picture(request, options, family)
    if (pixels := request.batch * (num_frames or 1) * height * width) > MAX_PIXELS:
        what = "images" if num_frames is None else f"videos of {num_frames} frames"
        raise ValueError(
            f"{request.batch} {what} of {height} x {width} are {pixels:,} pixels in one call, more than "
            f"{MAX_PIXELS:,}: ask for fewer."
        )
    return request


def _from_picture(request: Request, options: Options, family: Family) -> Request:
    """The request with what it starts from."""
    if options.image is not None and request.num_frames is not None:
        raise ValueError(f"image={options.image!r:.100} is for image models: this one makes videos.")
    sizes, size = family.defaults.reference_sizes, (request.height, request.width)
    source = source_of(options, size, family.latent_channels, request.batch, sizes)
    if source is None or sizes:
        return replace(request, source=source)
    strength = _or(options.strength, family.defaults.strength)
    return replace(request, source=source, strength=strength, first=steps_left_out(strength, request.steps))


def _video(options: Options, defaults: Defaults) -> tuple[int | None, int | None]:
    """Frames, and frames a second; of an image, what the call says, which the family refuses."""
    if defaults.num_frames is None:
        if options.fps is not None or options.use_dynamic_cfg:
            raise ValueError(f"fps={options.fps!r} and use_dynamic_cfg are for video models: this one makes images.")
        return options.num_frames, None
    num_frames = _positive_int("num_frames", _or(options.num_frames, defaults.num_frames), MAX_FRAMES)
    return num_frames, _positive_int("fps", _or(options.fps, defaults.fps), MAX_FPS)


def _check_watcher(watcher: Any, num_frames: int | None, output_type: str) -> None:
    """Raises ValueError where a callback would never be called with frames, or could not be."""
    if watcher is None:
        return
    if not callable(watcher):
        raise ValueError(f"callback_on_frames={watcher!r:.100} must be callable: (pipeline, video, first, frames).")
    if num_frames is None:
        raise ValueError(f"callback_on_frames={watcher!r:.100} is for video models: this one makes images.")
    if output_type == "latent":
        raise ValueError(
            f"callback_on_frames={watcher!r:.100} sees no frames with {output_type=}: leave one of them out."
        )


def seeds_of(seed: int | list[int], batch: int) -> list[int]:
    """One seed per image of the batch; an int is repeated, since it draws all of them."""
    given: Any = seed
    values = list(given) if np.ndim(given) else [given] * batch  # no array: NumPy has no type of 2**63 and -1
    try:
        seeds = [-1 if isinstance(value, bool) else index(value) for value in values]
    except TypeError:
        seeds = [-1]
    if not all(0 <= value < 2**64 for value in seeds):  # torch's own range
        raise ValueError(f"seed={seed!r} must be an integer, or one integer per image, from 0 to 2**64 - 1.")
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for a batch of {batch} images: pass an int or one seed per image.")
    return seeds


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _positive_int(name: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer.")
    if value > most:
        raise ValueError(f"{name}={value} exceeds {most}.")
    return int(value)


def _number(name: str, value: Any) -> Any:
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_real or not (isinstance(value, int) or np.isfinite(value)):
        raise ValueError(f"{name}={value!r} must be a finite number.")
    if abs(value) > MAX_SCALE:
        raise ValueError(f"{name}={value!r} exceeds {MAX_SCALE:g}: no model is guided so far.")
    return value  # as it came: the metadata shows it


def _steps(options: Options, default: int) -> int:
    if options.sigmas is None:
        return _positive_int("num_inference_steps", _or(options.num_inference_steps, default), MAX_STEPS)
    steps = np.size(options.sigmas)
    if np.ndim(options.sigmas) != 1 or not steps:
        raise ValueError(f"sigmas={options.sigmas!r:.200} must be a list of numbers in (0, 1].")
    host_array("sigmas", options.sigmas)
    _positive_int("the number of sigmas", steps, MAX_STEPS)
    if options.num_inference_steps not in (None, steps):
        raise ValueError(
            f"num_inference_steps={options.num_inference_steps} but {steps} sigmas: leave one of them out."
        )
    return steps


def _scheduler(given: Any, family: Family, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """A scheduler_config: of a name, of a mapping, or the folder's own."""
    if given is None or given == own.get("_class_name"):
        return own
    name = given.get("_class_name") if isinstance(given, Mapping) else given
    if not isinstance(name, str) or name not in family.scheduler_classes:
        known = " and ".join(family.scheduler_classes)
        raise ValueError(f"scheduler={given!r:.200} is none of this model's: {known} are, by name or as _class_name.")
    config = given if isinstance(given, Mapping) else named_config(given, own)
    try:
        if isinstance(given, Mapping):
            check_settings(given)
        family.check_scheduler(config)
    except ValueError as error:
        raise ValueError(f"scheduler={given!r:.200}: {error}") from error
    return config


def _clip_skip(clip_skip: int | None) -> int:
    if clip_skip is not None and (not isinstance(clip_skip, (int, np.integer)) or clip_skip < 0):
        raise ValueError(f"{clip_skip=} must be an integer of 0 or more.")
    return clip_skip or 0


def _check_skipped(layers: list[int] | None, count: int) -> None:
    if layers is None:
        return
    if np.ndim(layers) != 1 or not np.issubdtype(np.asarray(layers, None if len(layers) else int).dtype, np.integer):
        raise ValueError(f"skip_guidance_layers={layers!r} must be a list of layer numbers.")
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"skip_guidance_layers={layers}: {outside} are not among the model's {count} layers.")


def _texts(options: Options, family: Family, prefix: str) -> list[list[str]] | None:
    """[texts of encoder 1, of encoder 2, ...]; a later encoder takes the first's prompt when it has none."""
    names = [f"{prefix}prompt", f"{prefix}prompt_2", f"{prefix}prompt_3"]
    for name in names[family.num_prompts :]:
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is not None, but this model has {family.num_prompts} text encoders.")
    first = getattr(options, names[0])
    first = first.tolist() if isinstance(first, np.ndarray) else first
    if first is None:
        for name in names[1:]:
            if getattr(options, name) is not None:
                raise ValueError(f"{name}={getattr(options, name)!r} needs {names[0]} too.")
        return None
    texts = []
    for name in names[: family.num_prompts]:
        value = getattr(options, name)
        value = value.tolist() if isinstance(value, np.ndarray) else value
        value = value or first  # as diffusers: an empty second prompt is the first one
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


def _prompts(options: Options, family: Family, sizes: ModelSizes, prefix: str) -> Prompts:
    texts, embeddings = _texts(options, family, prefix), _embeddings(options, sizes, prefix)
    if (texts is None) == (embeddings is None):
        raise ValueError(f"Pass either {prefix}prompt or {prefix}prompt_embeds: {'both' if texts else 'neither'} came.")
    return Prompts(texts=texts, embeddings=embeddings)


def _negative(options: Options, family: Family, sizes: ModelSizes, positive: Prompts) -> Prompts:
    """The other side of the guidance: "" when nothing was passed, one negative prompt for all when it is a string."""
    names = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")
    given = {name: getattr(options, name) for name in names}
    if given["negative_prompt"] is None and options.negative_prompt_embeds is None:
        given["negative_prompt"] = ""
    for name in names[1:]:  # as diffusers: an empty one is the first one
        given[name] = given[name] or None
    repeated = {name: [text] * positive.count if isinstance(text, str) else text for name, text in given.items()}
    negative = _prompts(replace(options, **repeated), family, sizes, "negative_")
    if negative.count != positive.count:
        raise ValueError(f"{negative.count} negative prompts for {positive.count} prompts: pass one, or one for each.")
    return negative


def _embeddings(options: Options, sizes: ModelSizes, prefix: str) -> Embeddings | None:
    names = f"{prefix}prompt_embeds", f"{prefix}pooled_prompt_embeds"
    given = [getattr(options, name) is not None for name in names]
    mask_name = f"{prefix}prompt_attention_mask"
    mask = getattr(options, mask_name)
    if not any(given):
        if mask is not None:
            raise ValueError(f"{mask_name} goes with {names[0]}, which is None.")
        return None
    if sizes.pooled_projection_dim is None and given[1]:
        raise ValueError(f"{names[1]} is not None, but this model takes no pooled text.")
    if sizes.pooled_projection_dim is not None and not all(given):
        raise ValueError(f"{names[0]} and {names[1]} go together: {names[given.index(False)]} is None.")
    text = host_array(names[0], getattr(options, names[0]))
    if text.ndim != 3 or text.shape[2] != sizes.joint_attention_dim or not text.size:
        raise ValueError(f"{names[0]} must be [batch, tokens, {sizes.joint_attention_dim}], got {list(text.shape)}.")
    lengths = None if mask is None else _lengths(mask_name, mask, text)
    if sizes.pooled_projection_dim is None:
        return Embeddings(text, lengths=lengths)
    pooled, want = host_array(names[1], getattr(options, names[1])), [len(text), sizes.pooled_projection_dim]
    if [*pooled.shape] != want:
        raise ValueError(f"{names[1]} must be {want}, got {list(pooled.shape)}.")
    return Embeddings(text, pooled, lengths)


def _lengths(name: str, mask: Any, text: np.ndarray) -> np.ndarray:
    """Tokens of each text, by a mask of its tokens."""
    mask = host_array(name, mask.astype(np.int32) if isinstance(mask, np.ndarray) and mask.dtype == bool else mask)
    if mask.shape != text.shape[:2]:
        raise ValueError(f"{name} must be {list(text.shape[:2])}, as its text has tokens, got {list(mask.shape)}.")
    lengths = (mask != 0).sum(1)
    if not lengths.all() or not np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None]):
        raise ValueError(f"{name} must be 1 for the tokens of a text, one at least, and 0 for padding after them.")
    return lengths.astype(np.int32)
