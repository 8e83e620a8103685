"""What HunyuanVideo (13B, text to video) does its own way."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dfa2_jax.encoders.specs import CLIP, LLAMA
from dfa2_jax.families.base import (
    Defaults,
    Embeddings,
    Encode,
    Schedule,
    Texts,
    check_multiples,
    expect_shape,
    true_cfg_scale,
    video_latent_frames,
    warn_of_half_cfg,
)
from dfa2_jax.families.hunyuanvideo.config import HunyuanVideoConfig
from dfa2_jax.families.hunyuanvideo.positions import rope_table
from dfa2_jax.families.hunyuanvideo.prompts import CROP_START, crop, templated
from dfa2_jax.families.hunyuanvideo.rules import RULES
from dfa2_jax.families.hunyuanvideo.transformer import HunyuanVideoConditions, HunyuanVideoTransformer
from dfa2_jax.nn.quantize import quantize
from dfa2_jax.options import Options
from dfa2_jax.sampling.guidance import ClassifierFree, Guidance, NoGuidance
from dfa2_jax.sampling.sinusoid import embedded_scalar, sinusoid
from dfa2_jax.sampling.solvers.schedulers import DPM, EULER, check_flow_scheduler, flow_steps
from dfa2_jax.sampling.tokens import Grid, VideoPatches
from dfa2_jax.vae.spec import HUNYUAN_AUTOENCODER
from dfa2_jax.weights.spec import ComponentSpec

logger = logging.getLogger("dfa2_jax")

TRANSFORMER = ComponentSpec(
    class_name="HunyuanVideoTransformer3DModel",
    config=HunyuanVideoConfig.from_json,
    build=HunyuanVideoTransformer,
    rules=RULES,
    quantize=partial(quantize, kept=("context_embedder",)),  # 256 tokens' work, read by every block
)


class HunyuanVideo:
    """Text to video: Llama's states without their padding, CLIP's pooled state, embedded guidance.

    As in diffusers, CLIP reads `prompt` too: `prompt_2` and `negative_prompt_2` have no effect, and a warning says so.
    """

    pipeline_class = "HunyuanVideoPipeline"
    scheduler_classes = (EULER, DPM)  # of UniPC diffusers takes other sigmas here than for images
    components = {
        "transformer": TRANSFORMER,
        "text_encoder": LLAMA,
        "text_encoder_2": CLIP,
        "vae": HUNYUAN_AUTOENCODER,
    }
    check_scheduler = staticmethod(check_flow_scheduler)
    num_prompts = 2

    def __init__(self, config: HunyuanVideoConfig, scheduler: Mapping[str, Any], transformer: nnx.Module):
        self.config = config
        self.tokens = VideoPatches(config.patch_size, config.patch_size_t, frames_first=False)
        self.latent_channels = config.in_channels
        self.defaults = Defaults(
            num_inference_steps=50,
            guidance_scale=6.0,
            max_sequence_length=256,
            latent_size=(90, 160),
            num_frames=129,
            fps=24,
        )

    def check(self, options: Options) -> None:
        if options.clip_skip is not None:
            raise ValueError(
                f"clip_skip={options.clip_skip!r} is for SD3 only: HunyuanVideo reads CLIP's pooled state."
            )
        if options.skip_guidance_layers is not None:
            layers = options.skip_guidance_layers
            raise ValueError(f"skip_guidance_layers={layers} is for SD3 only: HunyuanVideo has no skip-layer guidance.")
        if options.use_dynamic_cfg:
            raise ValueError("use_dynamic_cfg=True is CogVideoX's: HunyuanVideo's guidance is the same at every step.")
        warn_of_half_cfg(options)
        for side in ("", "negative_"):
            if getattr(options, f"{side}prompt_2") not in (None, getattr(options, f"{side}prompt")):
                logger.warning(
                    "%sprompt_2 is of no effect: as in diffusers, HunyuanVideo's CLIP reads %sprompt.", side, side
                )
            embeds, mask = f"{side}prompt_embeds", f"{side}prompt_attention_mask"
            if getattr(options, embeds) is not None and getattr(options, mask) is None:
                raise ValueError(f"{embeds} needs {mask} too: HunyuanVideo's text has padding, which no token attends.")

    def size(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        check_multiples(height, width, multiple)
        return height, width

    def latent_frames(self, num_frames: int | None) -> int:
        assert num_frames is not None
        frames = video_latent_frames(num_frames, self.config.temporal_compression_ratio)
        together = self.config.patch_size_t
        if frames % together:
            raise ValueError(f"{num_frames=} are {frames} latent frames, which must be a multiple of {together}.")
        return frames

    def extra_text_tokens(self, encoders: Any) -> int:
        return 0

    def cfg_scale(self, options: Options, guidance_scale: float) -> float | None:
        return true_cfg_scale(options)

    def encode(self, encode: Encode, texts: Texts) -> Embeddings:
        prompts, length = texts.prompts[0], CROP_START + texts.length
        llama = encode("text_encoder", "tokenizer", templated(prompts), length, counted=True)
        clip = encode("text_encoder_2", "tokenizer_2", prompts, None, texts.clip_skip)
        if llama is None or clip is None:
            absent = "text_encoder" if llama is None else "text_encoder_2"
            needed = "prompt_embeds, pooled_prompt_embeds and prompt_attention_mask"
            raise ValueError(f"The folder has no {absent}: pass {needed}.")
        states, lengths = crop(*llama)
        return Embeddings(np.asarray(states), np.asarray(clip.pooled), lengths)

    def conditions(
        self, text: Embeddings, grid: Grid, guidance_scale: float, dtype: DTypeLike
    ) -> HunyuanVideoConditions:
        assert text.pooled is not None
        cos, sin = rope_table(self.config, grid, text.text.shape[1])
        embedded = None
        if self.config.guidance_embeds:
            embedded = sinusoid(embedded_scalar(np.array([guidance_scale], np.float32), dtype))
        return HunyuanVideoConditions(text.text, text.pooled, cos, sin, embedded, text.lengths)

    def guidance(self, options: Options, cfg_scale: float | None, schedule: Schedule) -> Guidance:
        return NoGuidance() if cfg_scale is None else ClassifierFree.constant(cfg_scale, len(schedule.timesteps))

    def schedule(
        self,
        scheduler: Mapping[str, Any],
        sigmas: Sequence[float] | np.ndarray | None,
        steps: int,
        num_visual: int,
        dtype: DTypeLike,
    ) -> Schedule:
        """diffusers rounds times as latents: these are float32 at first, and of the model's dtype after a step."""
        default = np.linspace(1.0, 0.0, steps + 1)[:-1]
        levels, timesteps, solver = flow_steps(scheduler, sigmas, default, num_visual)
        times = timesteps.astype(np.float32)
        times[1:] = times[1:].astype(dtype)
        return Schedule(levels, timesteps, times, solver, rounds_noise=False)

    def output_latents(self, tokens: np.ndarray, grid: Grid) -> np.ndarray:
        """[B, C, F, h, w]."""
        return self.tokens.unpack(tokens, grid)

    def input_tokens(self, latents: np.ndarray, grid: Grid) -> np.ndarray:
        expect_shape("latents", latents, (None, *self.tokens.noise_shape(self.latent_channels, grid)))
        return self.tokens.pack(latents)
