"""What FLUX.1 does its own way."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dfa2_jax.encoders.specs import CLIP, T5
from dfa2_jax.families.base import (
    Defaults,
    Embeddings,
    Encode,
    Schedule,
    Texts,
    expect_shape,
    one_frame,
    refuse_mask,
    true_cfg_scale,
    warn_of_half_cfg,
)
from dfa2_jax.families.flux.config import FluxConfig
from dfa2_jax.families.flux.positions import rope_table
from dfa2_jax.families.flux.rules import ORIGINAL, RULES, XLABS
from dfa2_jax.families.flux.transformer import FluxConditions, FluxTransformer
from dfa2_jax.nn.quantize import quantize
from dfa2_jax.options import Options
from dfa2_jax.sampling.guidance import ClassifierFree, Guidance, NoGuidance
from dfa2_jax.sampling.sinusoid import embedded_scalar, sinusoid
from dfa2_jax.sampling.solvers.schedulers import FLOW_SCHEDULERS, check_flow_scheduler, flow_steps
from dfa2_jax.sampling.tokens import CHANNEL_ROW_COLUMN, Grid, Patches
from dfa2_jax.vae.spec import AUTOENCODER
from dfa2_jax.weights.spec import ComponentSpec

logger = logging.getLogger("dfa2_jax")


def text_to_image(json: Mapping[str, Any]) -> FluxConfig:
    """
    Raises:
        ValueError: tokens hold more than latents.
    """
    if (config := FluxConfig.from_json(json)).beside_channels:
        raise ValueError(
            f"in_channels={config.in_channels} and out_channels={config.token_channels} are no text-to-image FLUX.1's: "
            "FLUX.1-Fill is a FluxFillPipeline, and -Canny and -Depth are not supported."
        )
    return config


def fill(json: Mapping[str, Any]) -> FluxConfig:
    """
    Raises:
        ValueError: tokens have no room for picture and mask.
    """
    if (config := FluxConfig.from_json(json)).beside_channels <= config.token_channels:
        raise ValueError(
            f"in_channels={config.in_channels} of a FluxFillPipeline must hold latents twice "
            f"(out_channels={config.token_channels}), and the mask."
        )
    return config


TRANSFORMER = ComponentSpec(
    class_name="FluxTransformer2DModel",
    config=text_to_image,
    build=FluxTransformer,
    rules=RULES,
    lora_rules=[*ORIGINAL, *XLABS],
    quantize=quantize,
)

REFERENCE_SIZES = tuple(
    (height, width)
    for long, short in (
        *((1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880), (1104, 944)),
        (1024, 1024),
    )
    for height, width in {(long, short), (short, long)}
)
"""Pixels that Kontext was trained with (diffusers 0.42.1, PREFERRED_KONTEXT_RESOLUTIONS)."""


class Flux:
    """FLUX.1 dev (embedded guidance) and schnell: CLIP's pooled state and T5's tokens."""

    pipeline_class = "FluxPipeline"
    scheduler_classes = tuple(FLOW_SCHEDULERS)
    components = {"transformer": TRANSFORMER, "text_encoder": CLIP, "text_encoder_2": T5, "vae": AUTOENCODER}
    check_scheduler = staticmethod(check_flow_scheduler)
    num_prompts = 2
    latent_frames = staticmethod(one_frame)

    def __init__(self, config: FluxConfig, scheduler: Mapping[str, Any], transformer: nnx.Module):
        self.config = config
        self.tokens = Patches(config.patch_size, CHANNEL_ROW_COLUMN)
        self.latent_channels = config.token_channels // config.patch_size**2
        # Only schnell of the published models has a fixed shift. A fine-tune without guidance keeps dev's scheduler.
        is_schnell = not config.guidance_embeds and not scheduler.get("use_dynamic_shifting", False)
        steps, scale, length = (4, 0.0, 256) if is_schnell else (28, 3.5, 512)
        self.defaults = Defaults(steps, scale, length, latent_size=(128, 128))

    def check(self, options: Options) -> None:
        refuse_mask(options)
        warn_of_half_cfg(options)
        if options.clip_skip is not None:
            raise ValueError(f"clip_skip={options.clip_skip!r} is for SD3 only: FLUX reads CLIP's pooled state.")
        if options.skip_guidance_layers is not None:
            layers = options.skip_guidance_layers
            raise ValueError(f"skip_guidance_layers={layers} is for SD3 only: FLUX has no skip-layer guidance.")

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

    def extra_text_tokens(self, encoders: Any) -> int:
        return 0

    def cfg_scale(self, options: Options, guidance_scale: float) -> float | None:
        return true_cfg_scale(options)

    def encode(self, encode: Encode, texts: Texts) -> Embeddings:
        clip = encode("text_encoder", "tokenizer", texts.prompts[0], None, texts.clip_skip)
        t5 = encode("text_encoder_2", "tokenizer_2", texts.prompts[1], texts.length)
        if clip is None or t5 is None:
            absent = "text_encoder" if clip is None else "text_encoder_2"
            raise ValueError(f"The folder has no {absent}: pass prompt_embeds and pooled_prompt_embeds.")
        return Embeddings(np.asarray(t5), np.asarray(clip.pooled))

    def conditions(self, text: Embeddings, grid: Grid, guidance_scale: float, dtype: DTypeLike) -> FluxConditions:
        cos, sin = rope_table(self.config.axes_dims_rope, text.text.shape[1], grid.rows, grid.columns)
        assert text.pooled is not None
        embedded = None
        if self.config.guidance_embeds:
            embedded = sinusoid(embedded_scalar(np.array([guidance_scale], np.float32), dtype))
        return FluxConditions(text.text, text.pooled, cos, sin, embedded)

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
        """diffusers divides times by 1000 in the pipeline and multiplies in the model, both in the model's dtype."""
        levels, timesteps, solver = flow_steps(scheduler, sigmas, np.linspace(1.0, 1 / steps, steps), num_visual)
        thousandths = timesteps.astype(dtype) / np.asarray(1000, dtype)
        return Schedule(levels, timesteps, embedded_scalar(thousandths, dtype), solver)

    def output_latents(self, tokens: np.ndarray, grid: Grid) -> np.ndarray:
        """Packed, [B, V, 64]."""
        return tokens

    def input_tokens(self, latents: np.ndarray, grid: Grid) -> np.ndarray:
        expect_shape("latents", latents, (None, grid.num_visual, self.config.token_channels))
        return latents


class FluxFill(Flux):
    """FLUX.1-Fill paints a mask anew: tokens hold the rest of the picture, and the mask, beside latents."""

    pipeline_class = "FluxFillPipeline"
    components = Flux.components | {"transformer": replace(TRANSFORMER, config=fill)}

    def __init__(self, config: FluxConfig, scheduler: Mapping[str, Any], transformer: nnx.Module):
        super().__init__(config, scheduler, transformer)
        self.defaults = Defaults(50, 30.0, 512, latent_size=(128, 128), strength=1.0)

    def check(self, options: Options) -> None:
        super().check(options)
        if options.true_cfg_scale != 1.0:
            raise ValueError(f"true_cfg_scale={options.true_cfg_scale} is for other FLUX.1 models: Fill has none.")
        if lacking := [name for name in ("image", "mask_image") if getattr(options, name) is None]:
            raise ValueError(f"{' and '.join(lacking)} must be given: FLUX.1-Fill paints a part of a picture anew.")


class FluxKontext(Flux):
    """FLUX.1-Kontext edits a picture: its tokens lie between text and image, and attention sees them as text."""

    pipeline_class = "FluxKontextPipeline"

    def __init__(self, config: FluxConfig, scheduler: Mapping[str, Any], transformer: nnx.Module):
        super().__init__(config, scheduler, transformer)
        self.defaults = Defaults(28, 3.5, 512, latent_size=(128, 128), reference_sizes=REFERENCE_SIZES)

    def check(self, options: Options) -> None:
        super().check(options)
        for name in ("mask_image", "strength"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{name}={value!r:.100} is for other FLUX.1 models: Kontext starts from noise.")

    def with_reference(
        self, conditions: FluxConditions, tokens: np.ndarray, sides: tuple[int, int], grid: Grid
    ) -> FluxConditions:
        """As in `families.base.SeesReference`."""
        num_text, times = conditions.text.shape[1], len(conditions.text) // len(tokens)
        cos, sin = rope_table(self.config.axes_dims_rope, num_text, grid.rows, grid.columns, sides)
        return replace(conditions, cos=cos, sin=sin, reference=np.tile(tokens, (times, 1, 1)))
