"""Everything else: tokens column by column, a two-step solver, prompts read letter by letter."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfa2_jax.families.base import Defaults, Embeddings, Schedule, one_frame
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.sampling.guidance import ClassifierFree, NoGuidance
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.tokens import Grid
from dfa2_jax.weights.spec import ComponentSpec
from toy_family.transformer import RULES, ToyConditions, ToyConfig, ToyTransformer


class ColumnTokens:
    """One token per latent pixel, column by column."""

    def grid(self, frames, height, width):
        return Grid(frames, height, width)

    def noise_shape(self, channels, grid):
        return channels, grid.rows, grid.columns

    def pack_noise(self, noise):
        return self.pack(noise[:, :, None])

    def pack(self, latents):
        batch, channels = latents.shape[:2]
        return latents[:, :, 0].transpose(0, 3, 2, 1).reshape(batch, -1, channels)

    def unpack(self, tokens, grid):
        columns = tokens.reshape(len(tokens), grid.columns, grid.rows, -1)
        return columns.transpose(0, 3, 2, 1)[:, :, None]


@carrier
class TwoStep:
    """Adams-Bashforth of second order: the last velocity is the solver's state."""

    sizes: Float[Array | np.ndarray, " padded_steps"]

    def init(self, x):
        return np.zeros(x.shape, np.float32)

    def step(self, x, prediction, i, state):
        ahead = jnp.where(jnp.asarray(i) == 0, prediction, 1.5 * prediction - 0.5 * state)
        return x + jnp.asarray(self.sizes)[i] * ahead, prediction


class ToyFamily:
    pipeline_class = "ToyPipeline"
    scheduler_classes = ("ToyScheduler",)
    components = {
        "transformer": ComponentSpec(
            class_name="ToyModel", config=ToyConfig.from_json, build=ToyTransformer, rules=RULES
        )
    }
    num_prompts = 1
    latent_frames = staticmethod(one_frame)

    def __init__(self, config: ToyConfig, scheduler: Mapping[str, Any], transformer: Any):
        self.config, self.tokens, self.latent_channels = config, ColumnTokens(), config.in_channels
        self.defaults = Defaults(num_inference_steps=4, guidance_scale=1.0, max_sequence_length=8, latent_size=(8, 8))

    @staticmethod
    def check_scheduler(config):
        if config.get("kind") != "two step":
            raise ValueError(f"kind={config.get('kind')!r} is not 'two step'")

    def check(self, options):
        if options.skip_guidance_layers is not None:
            raise ValueError("skip_guidance_layers: the toy has no skip-layer guidance.")

    def size(self, height, width, multiple):
        return height // multiple * multiple, width // multiple * multiple

    def extra_text_tokens(self, encoders):
        return 0

    def cfg_scale(self, options, guidance_scale):
        return guidance_scale if guidance_scale > 1 else None

    def encode(self, encode, texts):
        codes = np.zeros((len(texts.prompts[0]), texts.length), np.int64)
        for code, prompt in zip(codes, texts.prompts[0], strict=True):
            letters = prompt.encode()[: texts.length]
            code[: len(letters)] = np.frombuffer(letters, np.uint8)
        angles = codes[..., None] * np.arange(1, self.config.joint_attention_dim + 1)
        return Embeddings(np.sin(angles).astype(np.float32))

    def conditions(self, text, grid, guidance_scale, dtype):
        return ToyConditions(text.text)

    def guidance(self, options, cfg_scale, schedule):
        return NoGuidance() if cfg_scale is None else ClassifierFree.constant(cfg_scale, len(schedule.timesteps))

    def schedule(self, scheduler, sigmas, steps, num_visual, dtype):
        levels = np.linspace(1, 0, steps + 1, dtype=np.float32) if sigmas is None else np.append(sigmas, 0)
        levels = levels.astype(np.float32)
        return Schedule(levels, 1000 * levels[:-1], 1000 * levels[:-1], TwoStep(pad_steps(np.diff(levels))))

    def output_latents(self, tokens, grid):
        return self.tokens.unpack(tokens, grid)[:, :, 0]

    def input_tokens(self, latents, grid):
        return self.tokens.pack(latents[:, :, None])
