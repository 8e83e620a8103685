"""What FLUX.1 does its own way."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from dfa2_jax.encoders.specs import CLIP, T5
from dfa2_jax.families.base import Defaults, Embeddings, Encode, expect_shape
from dfa2_jax.families.flux.rules import RULES
from dfa2_jax.families.flux.transformer import FluxConfig, FluxTransformer
from dfa2_jax.sampling.schedule import check_flow_match, embedded_scalar, flow_match_sigmas
from dfa2_jax.sampling.tokens import CHANNEL_ROW_COLUMN, rope_table
from dfa2_jax.vae.spec import AUTOENCODER
from dfa2_jax.weights.spec import ComponentSpec

logger = logging.getLogger("dfa2_jax")

TRANSFORMER = ComponentSpec(
    class_name="FluxTransformer2DModel", config=FluxConfig.from_json, build=FluxTransformer, rules=RULES
)


class Flux:
    """FLUX.1 dev (embedded guidance) and schnell: CLIP's pooled state and T5's tokens."""

    pipeline_class = "FluxPipeline"
    scheduler_class = "FlowMatchEulerDiscreteScheduler"
    components = {
        "transformer": TRANSFORMER,
        "text_encoder": CLIP,
        "text_encoder_2": T5,
        "vae": AUTOENCODER,
    }
    check_scheduler = staticmethod(check_flow_match)
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
        expect_shape("latents", latents, (None, rows * columns, self.config.in_channels))
        return latents

    def encode(self, encode: Encode, prompts: list[list[str]], length: int, clip_skip: int) -> Embeddings:
        clip = encode("text_encoder", "tokenizer", prompts[0], None, clip_skip)
        t5 = encode("text_encoder_2", "tokenizer_2", prompts[1], length)
        if clip is None or t5 is None:
            absent = "text_encoder" if clip is None else "text_encoder_2"
            raise ValueError(f"The folder has no {absent}: pass prompt_embeds and pooled_prompt_embeds.")
        return Embeddings(np.asarray(t5), np.asarray(clip.pooled))
