"""What a family of models is: all that differs between pipelines, and nothing else.

A family is a folder with a transformer, rules for its weights and a `Family`; `registry.register` makes it known.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Real

from dfa2_jax.nn.attention import Attend, AttentionCall
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.options import Options
from dfa2_jax.sampling.guidance import Guidance
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.sinusoid import sinusoid
from dfa2_jax.sampling.solvers.base import FlowSolver, Solver
from dfa2_jax.sampling.tokens import Grid, Tokens
from dfa2_jax.weights.spec import ComponentSpec

logger = logging.getLogger("dfa2_jax")

Encode = Callable[..., Any]
"""`encode(encoder, tokenizer, prompts, length, *args)`: the encoder's output, None if the folder has none.

With `counted=True`, the output and how many tokens each prompt has without padding."""


@carrier
class Embeddings:
    """Text states [B, T, E]; pooled text [B, P] and tokens without padding [B], where the family has them."""

    text: Float[np.ndarray, "B T E"]
    pooled: Float[np.ndarray, "B P"] | None = None
    lengths: Int[np.ndarray, " B"] | None = None

    def padded(self, length: int) -> "Embeddings":
        """With texts of so many tokens, where it is known which of them are padding."""
        if self.lengths is None:
            return self
        padding = (0, 0), (0, length - self.text.shape[1]), (0, 0)
        return Embeddings(np.pad(self.text, padding), self.pooled, self.lengths)

    @property
    def attention_mask(self) -> Int[np.ndarray, "B T"] | None:
        """1 for tokens, 0 for padding: the `prompt_attention_mask` of a call. None: there is no padding."""
        if self.lengths is None:
            return None
        return (np.arange(self.text.shape[1]) < self.lengths[:, None]).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Prompts, as the text encoders of a family are asked for them.

    prompts: a list for each encoder.
    length: tokens, of the encoders whose length a call may choose.
    clip_skip: last layers of CLIP to leave out. A family without CLIP does not read this field.
    """

    prompts: list[list[str]]
    length: int
    clip_skip: int = 0


@dataclass(frozen=True)
class Defaults:
    """What a call takes where it says nothing."""

    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    latent_size: tuple[int, int]
    """Latent pixels, height and width."""
    num_frames: int | None = None
    """None: the family makes images."""
    fps: int | None = None
    """Frames a second of its videos."""
    strength: float = 0.6
    """Share of the noise that a picture starts with."""
    reference_sizes: tuple[tuple[int, int], ...] = ()
    """Pixels of pictures, height and width, that the transformer sees as tokens of their own; (): it sees none."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a call.

    sigmas: noise levels, the last one 0.
    timesteps: the scheduler's own, as diffusers hands them to callbacks.
    times: their sinusoids are what the transformer takes.
    time_features: sines and cosines of one time.
    rounds_noise: torch draws noise in the model's dtype. False: in float32, and rounds latents after the first step.
    """

    sigmas: Float[np.ndarray, " levels"]
    timesteps: Real[np.ndarray, " steps"]
    times: Float[np.ndarray, " steps"]
    solver: Solver
    time_features: int = 256
    rounds_noise: bool = True

    def from_step(self, first: int) -> "Schedule":
        """The steps from this one on; its solver must be a `FlowSolver`."""
        if not first:
            return self
        assert isinstance(self.solver, FlowSolver), self.solver
        sigmas, timesteps, times = (x[first:] for x in (self.sigmas, self.timesteps, self.times))
        solver = type(self.solver).of(sigmas)
        return replace(self, sigmas=sigmas, timesteps=timesteps, times=times, solver=solver)

    def embedded(self, times: Float[np.ndarray, " steps"]) -> Float[np.ndarray, "padded_steps E"]:
        """Times as the transformer takes them."""
        return pad_steps(sinusoid(times, self.time_features))


@runtime_checkable
class Conditions(Protocol):
    """What a transformer is told beside latents and time: the family's own pytree."""

    def last(self, count: int) -> "Conditions":
        """Those of the last `count` rows of the batch: guidance's conditional side."""
        ...

    def share(self, rows: Callable[[Any], Any], tokens: Callable[[Any, int], Any]) -> "Conditions":
        """One device's share.

        Args:
            rows: cuts an array along its first axis, the batch.
            tokens: cuts an array along an axis of text or of visual tokens, each on its own.
        """
        ...


class Config(Protocol):
    """What the pipeline reads of a transformer's config, beside what the family reads itself.

    patch_size: latent pixels along a side of a visual token.
    num_layers: blocks that skip-layer guidance can name.
    joint_attention_dim: width of the text states. A model with pooled text has `pooled_projection_dim` too.
    """

    patch_size: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int

    def calls(self, num_text: int, num_visual: int) -> tuple[AttentionCall, ...]:
        """Every attention layer in order of execution: what plans are made of."""
        ...


@runtime_checkable
class Transformer(Protocol):
    """One forward; scan, memory and plans come from outside."""

    config: Any
    """A `Config`."""

    def __call__(
        self,
        tokens: Float[Array, "B V C"],
        timestep: Float[Array, "#B E"],
        conditions: Any,
        attend: Attend | None = None,
        *,
        memory: dict[str, Any] | None = None,
        plans: dict[str, Any] | None = None,
        skipped_blocks: Bool[Array, " blocks"] | None = None,
        unroll: int | bool = 1,
    ) -> tuple[Float[Array, "B V C"], dict[str, Any]]:
        """The prediction, and what attention remembers, by stack of layers.

        Args:
            attend: None: dense.
            memory: by stack, what `attend` remembers so far; a stack without an entry remembers nothing.
            plans: by stack, with a leading axis of layers; None: all heads dense.
            skipped_blocks: blocks to leave out.
            unroll: blocks compiled per iteration of a scan over layers.
        """
        ...


@runtime_checkable
class Family(Protocol):
    """A pipeline class of diffusers.

    Made by `Family(config, scheduler, transformer)`: the transformer's config, scheduler_config.json, and the loaded
    transformer, from which it may take what belongs on the host.
    """

    pipeline_class: str
    scheduler_classes: tuple[str, ...]
    components: Mapping[str, ComponentSpec]
    num_prompts: int
    """Text encoders, each with a prompt argument of its own."""
    tokens: Tokens
    latent_channels: int
    defaults: Defaults

    def check_scheduler(self, config: Mapping[str, Any], /) -> None:
        """Raises ValueError where a scheduler_config.json asks for what is not implemented."""
        ...

    def check(self, options: Options) -> None:
        """Raises ValueError for options that the family has not."""
        ...

    def size(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        """Pixels of the image; raises ValueError or rounds where they are not multiples of a token's pixels."""
        ...

    def latent_frames(self, num_frames: int | None) -> int:
        """Latent frames of a video, or one; raises ValueError where there is no such video."""
        ...

    def extra_text_tokens(self, encoders: Any) -> int:
        """Text tokens of the joint sequence beside those that `max_sequence_length` counts."""
        ...

    def cfg_scale(self, options: Options, guidance_scale: float) -> float | None:
        """The scale of a doubled batch, or None for one forward per image."""
        ...

    def encode(self, encode: Encode, texts: Texts) -> Embeddings: ...

    def conditions(self, text: Embeddings, grid: Grid, guidance_scale: float, dtype: DTypeLike) -> Conditions:
        """Args: `dtype`: that scalars are rounded to, as torch does."""
        ...

    def guidance(self, options: Options, cfg_scale: float | None, schedule: Schedule) -> Guidance: ...

    def schedule(
        self,
        scheduler: Mapping[str, Any],
        sigmas: Sequence[float] | np.ndarray | None,
        steps: int,
        num_visual: int,
        dtype: DTypeLike,
    ) -> Schedule:
        """The steps of a call by a scheduler_config.json; raises ValueError where it takes no sigmas."""
        ...

    def output_latents(self, tokens: np.ndarray, grid: Grid) -> np.ndarray:
        """Latents as diffusers' pipeline takes and returns them."""
        ...

    def input_tokens(self, latents: np.ndarray, grid: Grid) -> np.ndarray:
        """The inverse; raises ValueError where the shape is another."""
        ...


@runtime_checkable
class SeesReference(Protocol):
    """A family whose transformer sees the tokens of a picture beside the image's (`Defaults.reference_sizes`)."""

    def with_reference(
        self, conditions: Any, tokens: Float[np.ndarray, "B R P"], sides: tuple[int, int], grid: Grid
    ) -> Conditions:
        """Conditions with a picture's tokens.

        Args:
            sides: rows and columns of them.
        """
        ...


def one_frame(num_frames: int | None) -> int:
    """The `Family.latent_frames` of a family that makes images."""
    if num_frames is not None:
        raise ValueError(f"num_frames={num_frames!r} is for video models: this one makes images.")
    return 1


def video_latent_frames(num_frames: int, ratio: int) -> int:
    """Latent frames of a video whose first frame is a latent one of its own.

    Raises:
        ValueError: the others do not fill latent frames.
    """
    if num_frames % ratio != 1 % ratio:
        near = max(num_frames // ratio * ratio, 0) + 1
        raise ValueError(f"{num_frames=} must be 1 more than a multiple of {ratio}: try {near} or {near + ratio}.")
    return (num_frames - 1) // ratio + 1


def check_multiples(height: int, width: int, multiple: int) -> None:
    """
    Raises:
        ValueError: a side has no whole number of tokens.
    """
    if height % multiple or width % multiple:
        down = f"{height // multiple * multiple} x {width // multiple * multiple}"
        raise ValueError(f"height x width = {height} x {width} must be multiples of {multiple}: try {down}.")


def true_cfg_scale(options: Options) -> float | None:
    """The scale of true CFG, a second forward: a negative prompt and a `true_cfg_scale` above 1 ask for it."""
    is_negative = options.negative_prompt is not None or options.negative_prompt_embeds is not None
    return options.true_cfg_scale if options.true_cfg_scale > 1 and is_negative else None


def warn_of_half_cfg(options: Options) -> None:
    """Says that one of both alone is of no effect, as in diffusers."""
    given = [name for name in ("negative_prompt", "negative_prompt_embeds") if getattr(options, name) is not None]
    if given and options.true_cfg_scale <= 1:
        logger.warning("%s has no effect: it needs true_cfg_scale above 1.", given[0])
    elif not given and options.true_cfg_scale > 1:
        logger.warning("true_cfg_scale=%g has no effect: it needs a negative_prompt.", options.true_cfg_scale)


def refuse_mask(options: Options) -> None:
    """
    Raises:
        ValueError: a call masks text, which this family attends whole.
    """
    if options.prompt_attention_mask is not None or options.negative_prompt_attention_mask is not None:
        raise ValueError("prompt_attention_mask is for HunyuanVideo only: this model attends all text, padded or not.")


def expect_shape(name: str, x: np.ndarray, want: tuple[int | None, ...]) -> None:
    if x.ndim != len(want) or any(w is not None and w != got for w, got in zip(want, x.shape, strict=True)):
        shown = ["batch" if w is None else w for w in want]
        raise ValueError(f"{name} have shape {list(x.shape)}, but this model and image size need {shown}.")
