"""A folder's networks, loaded, with what their family knows of them."""

import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from dfa2_jax.families.base import Embeddings, Family
from dfa2_jax.families.registry import FAMILIES
from dfa2_jax.options import suggests_names
from dfa2_jax.pipeline.components import Component, Networks
from dfa2_jax.pipeline.fit import check_fit
from dfa2_jax.pipeline.request import ModelSizes, Request
from dfa2_jax.sampling.tokens import Grid
from dfa2_jax.weights.checkpoint import Checkpoint


class Loaded:
    """What a call of a pipeline runs on.

    Attributes:
        folder: of the checkpoint.
        requested_dtype: what the caller asked for; None: the checkpoint's own.
        config: sizes of the transformer.
        family: what this kind of model does its own way.
        fingerprint: of the transformer's stored weights.
        pipeline_class: diffusers' name of this kind of model.
        scheduler: scheduler_config.json.
        sizes: what calls are checked against.
        transformer: its graph and parameters.
        dtype: of the transformer.
        torch_rounding: round where torch does in `dtype`, to reproduce diffusers' 16-bit images (off: float32 sinusoids
            and latents, closer to the float32 image).
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: Any = None, torch_rounding: bool = False):
        self.networks = Networks(checkpoint, dtype)
        self.folder = checkpoint.folder
        self.requested_dtype = None if dtype is None else jnp.dtype(dtype).name
        self.pipeline_class: str = checkpoint.pipeline_class
        self.torch_rounding = torch_rounding
        self.fingerprint: str = checkpoint.fingerprint
        self.config = checkpoint.config("transformer")
        checkpoint.check_scheduler()
        check_fit(checkpoint)
        self.networks.load_tokenizers()
        self.scheduler = checkpoint.configs["scheduler"]
        started = time.perf_counter()
        transformer: Any = checkpoint.load("transformer", dtype)
        self.dtype = transformer.dtype
        self.family: Family = FAMILIES[self.pipeline_class](self.config, self.scheduler, transformer)
        self.transformer = Component(transformer)
        if "vae" in self.networks:
            self.networks["vae"]  # now, not after the first loop
        self.load_seconds = time.perf_counter() - started

        levels = len(checkpoint.config("vae").block_out_channels) if "vae" in self.networks else 4
        vae_scale = 2 ** (levels - 1)
        self.sizes = ModelSizes(
            vae_scale=vae_scale,
            multiple=vae_scale * self.config.patch_size,
            image=vae_scale * self.family.defaults.latent_size,
            num_layers=self.config.num_layers,
            joint_attention_dim=self.config.joint_attention_dim,
            pooled_projection_dim=getattr(self.config, "pooled_projection_dim", None),
        )

    @suggests_names
    def encode_prompt(
        self, texts: list[list[str]], *, max_sequence_length: int | None = None, clip_skip: int = 0
    ) -> Embeddings:
        """Embeddings of prompts, one list per text encoder, to be passed as `prompt_embeds` and `pooled_prompt_embeds`.

        Raises:
            ValueError: the folder lacks an encoder that this model cannot do without.
        """
        length = max_sequence_length or self.family.defaults.max_sequence_length
        has_clip = "text_encoder" in self.networks
        depth = self.networks.config("text_encoder").num_hidden_layers if has_clip else clip_skip + 1
        if not 0 <= clip_skip < depth:
            raise ValueError(f"{clip_skip=} must be from 0 to {depth - 1}: the CLIP encoder has {depth} layers.")

        return self.family.encode(self.networks.encode, texts, length, clip_skip)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images, float32 [B, H, W, 3] in [0, 1], of latents [B, C, h, w] as the sampler leaves them.

        One image at a time: another batch size compiles nothing, and activations stay those of one image.
        """
        self.check_vae()
        vae = self.networks["vae"]
        nhwc = np.asarray(latents, np.float32).transpose(0, 2, 3, 1)
        decoded = [np.asarray(vae(image[None], method="decode"), np.float32) for image in nhwc]
        return np.clip(np.concatenate(decoded) / 2 + 0.5, 0, 1)

    def given_tokens(self, latents: Any, request: Request, grid: Grid) -> np.ndarray:
        """Patchified latents [B, V, P] of latents as diffusers takes them."""
        tokens = self.family.input_tokens(np.asarray(latents, np.float32), grid)
        if len(tokens) != request.batch:
            raise ValueError(f"{len(tokens)} latents for a batch of {request.batch} images.")
        return tokens

    def check_vae(self) -> None:
        if "vae" not in self.networks:
            raise ValueError('The folder has no vae: only output_type="latent" is possible.')

    @property
    def rounding(self) -> str | None:
        """Name of the dtype that the loop rounds to, as torch does."""
        return self.dtype.name if self.torch_rounding and self.dtype != jnp.float32 else None
