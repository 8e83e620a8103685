"""What Stable Diffusion 3 and 3.5 do their own way."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dfa2_jax.encoders.specs import CLIP_PROJECTED, T5
from dfa2_jax.families.base import (
    Defaults,
    Embeddings,
    Encode,
    Schedule,
    Texts,
    check_multiples,
    expect_shape,
    one_frame,
    refuse_mask,
)
from dfa2_jax.families.sd3.config import SD3Config
from dfa2_jax.families.sd3.positions import crop_positions
from dfa2_jax.families.sd3.rules import ORIGINAL, RULES
from dfa2_jax.families.sd3.transformer import PositionTable, SD3Conditions, SD3Transformer
from dfa2_jax.nn.quantize import quantize
from dfa2_jax.options import Options
from dfa2_jax.sampling.guidance import ClassifierFree, Guidance, NoGuidance, SkipLayer
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.solvers.schedulers import FLOW_SCHEDULERS, check_flow_scheduler, flow_steps
from dfa2_jax.sampling.tokens import ROW_COLUMN_CHANNEL, Grid, Patches
from dfa2_jax.vae.spec import AUTOENCODER
from dfa2_jax.weights.spec import ComponentSpec

TRANSFORMER = ComponentSpec(
    class_name="SD3Transformer2DModel",
    config=SD3Config.from_json,
    build=SD3Transformer,
    rules=RULES,
    lora_rules=ORIGINAL,
    place=lambda config: config.place,
    quantize=quantize,
)


class SD3:
    """Classifier-free guidance, three text encoders of which T5 may be absent, a position table on the host."""

    pipeline_class = "StableDiffusion3Pipeline"
    scheduler_classes = tuple(FLOW_SCHEDULERS)
    components = {
        "transformer": TRANSFORMER,
        "text_encoder": CLIP_PROJECTED,
        "text_encoder_2": CLIP_PROJECTED,
        "text_encoder_3": T5,
        "vae": AUTOENCODER,
    }
    check_scheduler = staticmethod(check_flow_scheduler)
    num_prompts = 3
    latent_frames = staticmethod(one_frame)

    def __init__(self, config: SD3Config, scheduler: Mapping[str, Any], transformer: nnx.Module):
        self.config = config
        (self.position_table,) = jax.tree.leaves(nnx.pop(transformer, PositionTable))
        self.tokens = Patches(config.patch_size, ROW_COLUMN_CHANNEL)
        self.latent_channels = config.in_channels
        self.defaults = Defaults(
            num_inference_steps=28,
            guidance_scale=7.0,
            max_sequence_length=256,
            latent_size=(config.sample_size, config.sample_size),
        )

    def check(self, options: Options) -> None:
        refuse_mask(options)
        if options.true_cfg_scale != 1.0:
            scale = options.true_cfg_scale
            raise ValueError(f"true_cfg_scale={scale} is FLUX's second forward: SD3 takes guidance_scale.")

    def size(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        check_multiples(height, width, multiple)
        if max(height, width) > (largest := self.config.pos_embed_max_size * multiple):
            raise ValueError(f"height x width = {height} x {width} exceeds the position table: {largest} px a side.")
        return height, width

    def extra_text_tokens(self, encoders: Any) -> int:
        """As many as the first CLIP tokenizer makes."""
        return encoders.tokenizer("tokenizer").model_max_length if "text_encoder" in encoders else 77

    def cfg_scale(self, options: Options, guidance_scale: float) -> float | None:
        return guidance_scale if guidance_scale > 1 else None

    def encode(self, encode: Encode, texts: Texts) -> Embeddings:
        """CLIP-L and bigG side by side, zero-padded to T5's width, before T5's tokens (pipeline_stable_diffusion_3)."""
        clips: list[Any] = []
        for index, suffix in enumerate(("", "_2")):
            tokens = clips[0].hidden.shape[1] if clips else None  # the first tokenizer's length holds for both
            out = encode(f"text_encoder{suffix}", f"tokenizer{suffix}", texts.prompts[index], tokens, texts.clip_skip)
            if out is None:
                raise ValueError(
                    f"The folder has no text_encoder{suffix}: pass prompt_embeds and pooled_prompt_embeds (and, with "
                    "guidance_scale > 1, negative_prompt_embeds and negative_pooled_prompt_embeds)."
                )
            clips.append(out)
        hidden = np.concatenate([np.asarray(clip.hidden) for clip in clips], axis=-1)
        pooled = np.concatenate([np.asarray(clip.pooled) for clip in clips], axis=-1)
        t5 = encode("text_encoder_3", "tokenizer_3", texts.prompts[2], texts.length)
        if t5 is None:  # SD3 without T5: zeros in its place
            t5 = np.zeros((len(hidden), texts.length, self.config.joint_attention_dim), hidden.dtype)
        t5 = np.asarray(t5)
        padded = np.pad(hidden, ((0, 0), (0, 0), (0, t5.shape[-1] - hidden.shape[-1])))
        return Embeddings(np.concatenate([padded.astype(t5.dtype), t5], axis=1), pooled)

    def conditions(self, text: Embeddings, grid: Grid, guidance_scale: float, dtype: DTypeLike) -> SD3Conditions:
        assert text.pooled is not None
        return SD3Conditions(text.text, text.pooled, crop_positions(self.position_table, grid.rows, grid.columns))

    def guidance(self, options: Options, cfg_scale: float | None, schedule: Schedule) -> Guidance:
        if cfg_scale is None:
            return NoGuidance()
        steps = len(schedule.timesteps)
        base = ClassifierFree.constant(cfg_scale, steps)
        if options.skip_guidance_layers is None:
            return base
        step = np.arange(steps)
        late = step > steps * options.skip_layer_guidance_start
        return SkipLayer(
            base,
            blocks=np.isin(np.arange(self.config.num_layers), options.skip_guidance_layers),
            scale=np.asarray(options.skip_layer_guidance_scale, np.float32),
            active=pad_steps(late & (step < steps * options.skip_layer_guidance_stop)),
        )

    def schedule(
        self,
        scheduler: Mapping[str, Any],
        sigmas: Sequence[float] | np.ndarray | None,
        steps: int,
        num_visual: int,
        dtype: DTypeLike,
    ) -> Schedule:
        """Times are timesteps in float32, whatever the model's dtype is."""
        levels, timesteps, solver = flow_steps({"max_shift": 1.16, **scheduler}, sigmas, steps, num_visual)
        return Schedule(levels, timesteps, timesteps.astype(np.float32), solver)

    def output_latents(self, tokens: np.ndarray, grid: Grid) -> np.ndarray:
        """[B, C, h, w]."""
        return self.tokens.unpack(tokens, grid)[:, :, 0]

    def input_tokens(self, latents: np.ndarray, grid: Grid) -> np.ndarray:
        patch = self.config.patch_size
        expect_shape("latents", latents, (None, self.latent_channels, grid.rows * patch, grid.columns * patch))
        return self.tokens.pack(latents[:, :, None])
