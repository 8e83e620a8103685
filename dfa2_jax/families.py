"""What differs between the SD3 and the FLUX.1 pipelines: defaults, prompt encoding, token order, timesteps."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from .models.flux import FluxConfig
from .models.patches import CHANNEL_ROW_COLUMN, ROW_COLUMN_CHANNEL, crop_positions, patchify, rope_table, unpatchify
from .models.sd3 import SD3Config
from .schedule import embedded_scalar, flow_match_sigmas

logger = logging.getLogger("dfa2_jax")

Encode = Callable[..., Any]
"""`encode(encoder, tokenizer, prompts, length, *args)`: the encoder's output, None if the folder has none."""


class Embeddings(NamedTuple):
    """Text states [B, T, E] and pooled text [B, P]."""

    text: np.ndarray
    pooled: np.ndarray


class Defaults(NamedTuple):
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int


class SD3:
    """Stable Diffusion 3 and 3.5: classifier-free guidance, three encoders of which T5 may be absent."""

    num_prompts = 3
    order = ROW_COLUMN_CHANNEL
    defaults = Defaults(num_inference_steps=28, guidance_scale=7.0, max_sequence_length=256)

    def __init__(self, config: SD3Config, scheduler: dict[str, Any], position_table: np.ndarray):
        self.config, self.scheduler, self.position_table = config, scheduler, position_table
        self.latent_channels = config.in_channels
        self.default_latent_size = config.sample_size

    def size(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        if height % multiple or width % multiple:
            down = f"{height // multiple * multiple} x {width // multiple * multiple}"
            raise ValueError(f"height x width = {height} x {width} must be multiples of {multiple}: try {down}.")
        return height, width

    def guidance(self, guidance_scale: float, true_cfg_scale: float, has_negative: bool) -> float | None:
        """The scale of a doubled batch, or None for one forward per image."""
        if true_cfg_scale != 1.0:
            raise ValueError(f"{true_cfg_scale=} is FLUX's second forward: SD3 takes guidance_scale.")
        return guidance_scale if guidance_scale > 1 else None

    def clip_tokens(self, networks: Any) -> int:
        """Of the joint sequence, beside T5's: as many as the first CLIP tokenizer makes."""
        return networks.tokenizer("tokenizer").model_max_length if "text_encoder" in networks else 77

    def embedded_guidance(self, guidance_scale: float, dtype: DTypeLike) -> None:
        return None

    def positions(self, num_text: int, rows: int, columns: int) -> np.ndarray:
        return crop_positions(self.position_table, rows, columns)

    def sigmas(self, sigmas: Sequence[float] | np.ndarray | None, steps: int, num_visual: int) -> np.ndarray:
        return flow_match_sigmas({"max_shift": 1.16} | self.scheduler, steps if sigmas is None else sigmas, num_visual)

    def model_timesteps(self, timesteps: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        return timesteps  # float32 whatever the model's dtype is

    def output_latents(self, tokens: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Latents as diffusers' pipeline takes and returns them: [B, C, h, w]."""
        return unpatchify(tokens, self.config.patch_size, self.order, rows, columns)

    def input_tokens(self, latents: np.ndarray, rows: int, columns: int) -> np.ndarray:
        patch = self.config.patch_size
        _expect_shape("latents", latents, (None, self.latent_channels, rows * patch, columns * patch))
        return patchify(latents, patch, self.order)

    def encode(self, encode: Encode, prompts: list[list[str]], length: int, clip_skip: int) -> Embeddings:
        """CLIP-L and bigG side by side, zero-padded to T5's width, before T5's tokens (pipeline_stable_diffusion_3)."""
        clips: list[Any] = []
        for index, suffix in enumerate(("", "_2")):
            tokens = clips[0].hidden.shape[1] if clips else None  # the first tokenizer's length holds for both
            out = encode(f"text_encoder{suffix}", f"tokenizer{suffix}", prompts[index], tokens, clip_skip)
            if out is None:
                raise ValueError(
                    f"The folder has no text_encoder{suffix}: pass prompt_embeds and pooled_prompt_embeds (and, with "
                    "guidance_scale > 1, negative_prompt_embeds and negative_pooled_prompt_embeds)."
                )
            clips.append(out)
        hidden = np.concatenate([np.asarray(clip.hidden) for clip in clips], axis=-1)
        pooled = np.concatenate([np.asarray(clip.pooled) for clip in clips], axis=-1)
        t5 = encode("text_encoder_3", "tokenizer_3", prompts[2], length)
        if t5 is None:  # SD3 without T5: zeros in its place
            t5 = np.zeros((len(hidden), length, self.config.joint_attention_dim), hidden.dtype)
        t5 = np.asarray(t5)
        padded = np.pad(hidden, ((0, 0), (0, 0), (0, t5.shape[-1] - hidden.shape[-1])))
        return Embeddings(np.concatenate([padded.astype(t5.dtype), t5], axis=1), pooled)


class Flux:
    """FLUX.1 dev (embedded guidance) and schnell: CLIP's pooled state and T5's tokens."""

    num_prompts = 2
    order = CHANNEL_ROW_COLUMN
    default_latent_size = 128

    def __init__(self, config: FluxConfig, scheduler: dict[str, Any], position_table: None = None):
        self.config, self.scheduler = config, scheduler
        self.latent_channels = config.in_channels // 4
        self.defaults = (
            Defaults(num_inference_steps=28, guidance_scale=3.5, max_sequence_length=512)
            if config.guidance_embeds
            else Defaults(num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256)
        )

    def size(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        floored = height // multiple * multiple, width // multiple * multiple
        if floored != (height, width):
            logger.warning(
                "height x width = %d x %d are not multiples of %d: the image will be %d x %d.",
                height, width, multiple, *floored,
            )  # fmt: skip
        if not all(floored):
            raise ValueError(f"height x width = {height} x {width} must be at least {multiple} each.")
        return floored

    def guidance(self, guidance_scale: float, true_cfg_scale: float, has_negative: bool) -> float | None:
        """The scale of a doubled batch (true CFG), or None for one forward per image."""
        return true_cfg_scale if true_cfg_scale > 1 and has_negative else None

    def clip_tokens(self, networks: Any) -> int:
        return 0

    def embedded_guidance(self, guidance_scale: float, dtype: DTypeLike) -> np.ndarray | None:
        if not self.config.guidance_embeds:
            return None
        return embedded_scalar(np.array([guidance_scale], np.float32), dtype)

    def positions(self, num_text: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        return rope_table(self.config.axes_dims_rope, num_text, rows, columns)

    def sigmas(self, sigmas: Sequence[float] | np.ndarray | None, steps: int, num_visual: int) -> np.ndarray:
        even = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
        return flow_match_sigmas(self.scheduler, even, num_visual)

    def model_timesteps(self, timesteps: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        """diffusers divides by 1000 in the pipeline and multiplies in the model, both in the model's dtype."""
        return embedded_scalar(timesteps.astype(dtype) / np.asarray(1000, dtype), dtype)

    def output_latents(self, tokens: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Latents as diffusers' pipeline takes and returns them: packed, [B, V, 64]."""
        return tokens

    def input_tokens(self, latents: np.ndarray, rows: int, columns: int) -> np.ndarray:
        _expect_shape("latents", latents, (None, rows * columns, self.config.in_channels))
        return latents

    def encode(self, encode: Encode, prompts: list[list[str]], length: int, clip_skip: int) -> Embeddings:
        clip = encode("text_encoder", "tokenizer", prompts[0], None, clip_skip)
        t5 = encode("text_encoder_2", "tokenizer_2", prompts[1], length)
        if clip is None or t5 is None:
            absent = "text_encoder" if clip is None else "text_encoder_2"
            raise ValueError(f"The folder has no {absent}: pass prompt_embeds and pooled_prompt_embeds.")
        return Embeddings(np.asarray(t5), np.asarray(clip.pooled))


FAMILIES = {"StableDiffusion3Pipeline": SD3, "FluxPipeline": Flux}


def _expect_shape(name: str, x: np.ndarray, want: tuple[int | None, ...]) -> None:
    if x.ndim != len(want) or any(w is not None and w != got for w, got in zip(want, x.shape, strict=True)):
        shown = ["batch" if w is None else w for w in want]
        raise ValueError(f"{name} have shape {list(x.shape)}, but this model and image size need {shown}.")
