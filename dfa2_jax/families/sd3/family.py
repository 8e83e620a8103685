"""What Stable Diffusion 3 and 3.5 do their own way."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from dfa2_jax.encoders.specs import CLIP_PROJECTED, T5
from dfa2_jax.families.base import Defaults, Embeddings, Encode, expect_shape
from dfa2_jax.families.sd3.rules import RULES
from dfa2_jax.families.sd3.transformer import SD3Config, SD3Transformer
from dfa2_jax.sampling.schedule import check_flow_match, flow_match_sigmas
from dfa2_jax.sampling.tokens import ROW_COLUMN_CHANNEL, crop_positions, patchify, unpatchify
from dfa2_jax.vae.spec import AUTOENCODER
from dfa2_jax.weights.spec import ComponentSpec

TRANSFORMER = ComponentSpec(
    class_name="SD3Transformer2DModel",
    config=SD3Config.from_json,
    build=SD3Transformer,
    rules=RULES,
    place=lambda config: config.place,
)


class SD3:
    """Stable Diffusion 3 and 3.5: classifier-free guidance, three encoders of which T5 may be absent."""

    pipeline_class = "StableDiffusion3Pipeline"
    scheduler_class = "FlowMatchEulerDiscreteScheduler"
    components = {
        "transformer": TRANSFORMER,
        "text_encoder": CLIP_PROJECTED,
        "text_encoder_2": CLIP_PROJECTED,
        "text_encoder_3": T5,
        "vae": AUTOENCODER,
    }
    check_scheduler = staticmethod(check_flow_match)
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
        expect_shape("latents", latents, (None, self.latent_channels, rows * patch, columns * patch))
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
