"""What CogVideoX does its own way."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dfa2_jax.encoders.specs import T5
from dfa2_jax.families.base import (
    Defaults,
    Embeddings,
    Encode,
    Schedule,
    Texts,
    check_multiples,
    expect_shape,
    refuse_mask,
    video_latent_frames,
)
from dfa2_jax.families.cogvideox.config import CogVideoXConfig
from dfa2_jax.families.cogvideox.positions import check_grid, position_table, rope_table
from dfa2_jax.families.cogvideox.rules import RULES
from dfa2_jax.families.cogvideox.transformer import CogVideoXConditions, CogVideoXTransformer
from dfa2_jax.options import Options
from dfa2_jax.sampling.guidance import Float32ClassifierFree, Guidance, NoGuidance
from dfa2_jax.sampling.solvers.schedulers import VP_SCHEDULERS, check_vp_scheduler, vp_steps
from dfa2_jax.sampling.tokens import Grid, VideoPatches
from dfa2_jax.vae.spec import VIDEO_AUTOENCODER
from dfa2_jax.weights.spec import ComponentSpec

TRANSFORMER = ComponentSpec(
    class_name="CogVideoXTransformer3DModel",
    config=CogVideoXConfig.from_json,
    build=CogVideoXTransformer,
    rules=RULES,
)


class CogVideoX:
    """Text to video: T5's states, classifier-free guidance, v-prediction; CogVideoX 1.5 packs two latent frames."""

    pipeline_class = "CogVideoXPipeline"
    scheduler_classes = tuple(VP_SCHEDULERS)
    components = {"transformer": TRANSFORMER, "text_encoder": T5, "vae": VIDEO_AUTOENCODER}
    check_scheduler = staticmethod(check_vp_scheduler)
    num_prompts = 1

    def __init__(self, config: CogVideoXConfig, scheduler: Mapping[str, Any], transformer: nnx.Module):
        self.config = config
        self.tokens = VideoPatches(config.patch_size, config.token_frames)
        self.latent_channels = config.in_channels
        self.defaults = Defaults(
            num_inference_steps=50,
            guidance_scale=6.0,
            max_sequence_length=config.max_text_seq_length,
            latent_size=(config.sample_height, config.sample_width),
            num_frames=config.sample_frames,
            fps=8 if config.patch_size_t is None else 16,
        )

    def check(self, options: Options) -> None:
        refuse_mask(options)
        if options.clip_skip is not None:
            raise ValueError(f"clip_skip={options.clip_skip!r} is for SD3 only: CogVideoX has no CLIP.")
        if options.skip_guidance_layers is not None:
            layers = options.skip_guidance_layers
            raise ValueError(f"skip_guidance_layers={layers} is for SD3 only: CogVideoX has no skip-layer guidance.")
        if options.true_cfg_scale != 1.0:
            scale = options.true_cfg_scale
            raise ValueError(f"true_cfg_scale={scale} is FLUX's second forward: CogVideoX takes guidance_scale.")
        if options.max_sequence_length not in (None, most := self.config.max_text_seq_length):
            raise ValueError(
                f"max_sequence_length={options.max_sequence_length} must be {most}, which CogVideoX was trained on."
            )

    def size(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        check_multiples(height, width, multiple)
        check_grid(self.config, Grid(1, height // multiple, width // multiple))
        return height, width

    def latent_frames(self, num_frames: int | None) -> int:
        assert num_frames is not None
        return video_latent_frames(num_frames, self.config.temporal_compression_ratio)

    def extra_text_tokens(self, encoders: Any) -> int:
        return 0

    def cfg_scale(self, options: Options, guidance_scale: float) -> float | None:
        return guidance_scale if guidance_scale > 1 else None

    def encode(self, encode: Encode, texts: Texts) -> Embeddings:
        states = encode("text_encoder", "tokenizer", texts.prompts[0], texts.length)
        if states is None:
            raise ValueError("The folder has no text_encoder: pass prompt_embeds (and negative_prompt_embeds).")
        return Embeddings(np.asarray(states))

    def conditions(self, text: Embeddings, grid: Grid, guidance_scale: float, dtype: DTypeLike) -> CogVideoXConditions:
        if not self.config.use_rotary_positional_embeddings:
            return CogVideoXConditions(text.text, table=position_table(self.config, grid))
        cos, sin = rope_table(self.config, text.text.shape[1], grid)
        return CogVideoXConditions(text.text, cos=cos, sin=sin)

    def guidance(self, options: Options, cfg_scale: float | None, schedule: Schedule) -> Guidance:
        if cfg_scale is None:
            return NoGuidance()
        steps = len(schedule.timesteps)
        if options.use_dynamic_cfg:
            return Float32ClassifierFree.dynamic(cfg_scale, schedule.timesteps, steps)
        return Float32ClassifierFree.constant(cfg_scale, steps)

    def schedule(
        self,
        scheduler: Mapping[str, Any],
        sigmas: Sequence[float] | np.ndarray | None,
        steps: int,
        num_visual: int,
        dtype: DTypeLike,
    ) -> Schedule:
        levels, timesteps, solver = vp_steps(scheduler, sigmas, steps)
        return Schedule(levels, timesteps, timesteps.astype(np.float32), solver, time_features=self.config.width)

    def output_latents(self, tokens: np.ndarray, grid: Grid) -> np.ndarray:
        """[B, F, C, h, w]; frames that only fill up a token are among them."""
        return self.tokens.unpack(tokens, grid).swapaxes(1, 2)

    def input_tokens(self, latents: np.ndarray, grid: Grid) -> np.ndarray:
        expect_shape("latents", latents, (None, *self.tokens.noise_shape(self.latent_channels, grid)))
        return self.tokens.pack_noise(latents)
