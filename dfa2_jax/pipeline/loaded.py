"""A folder's networks, loaded, with what their family knows of them."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from dfa2_jax.encoders.specs import CLIP, CLIP_PROJECTED
from dfa2_jax.families.base import Embeddings, Family, Texts
from dfa2_jax.families.registry import FAMILIES
from dfa2_jax.io.names import suggests_names
from dfa2_jax.parallel.mesh import DeviceMesh, devices_named
from dfa2_jax.pipeline.components import Component, Networks
from dfa2_jax.pipeline.decoding import OnFrames, frames_of, parts_of
from dfa2_jax.pipeline.fit import check_fit
from dfa2_jax.pipeline.request import ModelSizes, Request
from dfa2_jax.sampling.tokens import Grid
from dfa2_jax.vae.tiles import Tiles
from dfa2_jax.weights.checkpoint import Checkpoint
from dfa2_jax.weights.dtypes import FLOAT_DTYPES, PRECISIONS, TEXT_ENCODER_DTYPES, Precision, as_precision
from pallas_kernels import Device


def dtype_named(name: str, dtype: Any, known: Sequence[str]) -> str | None:
    """What the argument `name` is called; None: it is not given.

    Raises:
        ValueError: networks neither compute in it nor are quantised to it.
    """
    if dtype is not None and _name(dtype) not in known:
        raise ValueError(f"{name}={dtype!r:.100} is none of {', '.join(known)}.")
    return None if dtype is None else _name(dtype)


def check_precision(precision: str | None) -> None:
    """
    Raises:
        ValueError: this GPU has no products of it.
    """
    capability = Device.current().capability
    if precision == "float8" and capability is not None and capability < 8.9:
        raise ValueError(
            f"float8 needs a GPU of compute capability 8.9 (Ada, Hopper), this one has {capability}: use dtype='int8'."
        )


def _check_shares(shard_weights: bool, devices: int, precision: str | None) -> None:
    """
    Raises:
        ValueError: nothing, or nothing that can be cut, is there to share.
    """
    if shard_weights and devices < 2:
        raise ValueError(f"{shard_weights=} needs several devices: pass devices=2, or more.")
    if shard_weights and precision is not None:
        raise ValueError(f"{shard_weights=} shares matrices of 16 or 32 bits, not of {precision}: choose one of both.")


def _name(dtype: Any) -> str | None:
    """What a dtype, or a precision, is called."""
    if precision := as_precision(dtype):
        return precision
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return None


class Loaded:
    """What a call of a pipeline runs on.

    Attributes:
        folder: of the checkpoint.
        devices: that share the transformer's work; one of them, or none, for the default device alone.
        shard_weights: they share its blocks' weights, too, and text encoders'.
        own_mesh: those of this process, which encode prompts and decode images for themselves; None: no devices.
        requested_dtype, text_encoder_dtype: what the caller asked for; None: the checkpoint's own.
        precision: of the products in the transformer's blocks, where they are quantised; else None.
        config: sizes of the transformer.
        family: what this kind of model does its own way.
        checkpoint: the folder, with the LoRAs that are loaded.
        fingerprint: of the transformer's stored weights, and of LoRAs.
        folder_digest: of all that the folder holds, and of LoRAs.
        pipeline_class: diffusers' name of this kind of model.
        scheduler: scheduler_config.json.
        sizes: what calls are checked against.
        transformer: its graph and parameters.
        dtype: of the transformer.
        torch_rounding: round where torch does in `dtype`, to reproduce diffusers' 16-bit images (off: float32 sinusoids
            and latents, closer to the float32 image).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: Any = None,
        text_encoder_dtype: Any = None,
        devices: int | str | Sequence[Any] | None = None,
        shard_weights: bool = False,
        torch_rounding: bool = False,
    ):
        self.devices, self.shard_weights = devices_named(devices), shard_weights
        self.requested_dtype = dtype_named("dtype", dtype, (*FLOAT_DTYPES, *PRECISIONS))
        self.text_encoder_dtype = dtype_named("text_encoder_dtype", text_encoder_dtype, TEXT_ENCODER_DTYPES)
        self.precision: Precision | None = as_precision(dtype) or checkpoint.precision
        check_precision(self.precision)
        _check_shares(shard_weights, len(self.devices), self.precision)
        self.own_mesh = self._mesh([device for device in self.devices if device.process_index == jax.process_index()])
        shared = {name for name in checkpoint.classes if name.startswith("text_encoder") and shard_weights} | {"vae"}
        places = {} if self.own_mesh is None else dict.fromkeys(shared, self.own_mesh)
        self.networks = Networks(checkpoint, dtype, self.text_encoder_dtype, places)
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder
        self.pipeline_class: str = checkpoint.pipeline_class
        self.torch_rounding = torch_rounding
        self.fingerprint: str = checkpoint.adapted_fingerprint
        self.folder_digest: str = checkpoint.adapted_folder_digest
        self.config = checkpoint.config("transformer")
        checkpoint.check_scheduler()
        check_fit(checkpoint)
        self.networks.load_tokenizers()
        self.scheduler = checkpoint.configs["scheduler"]
        started = time.perf_counter()
        transformer: Any = checkpoint.load("transformer", dtype, self._mesh(self.devices))
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
            image=(vae_scale * self.family.defaults.latent_size[0], vae_scale * self.family.defaults.latent_size[1]),
            num_frames=self.family.defaults.num_frames,
            num_layers=self.config.num_layers,
            joint_attention_dim=self.config.joint_attention_dim,
            pooled_projection_dim=getattr(self.config, "pooled_projection_dim", None),
        )

    def _mesh(self, devices: Sequence[Any]) -> DeviceMesh | None:
        """Where weights lie; None: they stay where they are loaded."""
        return DeviceMesh.of(devices, 1, self.shard_weights) if devices else None

    @suggests_names
    def encode_prompt(
        self, texts: str | list[str] | list[list[str]], *, max_sequence_length: int | None = None, clip_skip: int = 0
    ) -> Embeddings:
        """Embeddings of prompts, to be passed as `prompt_embeds` and `pooled_prompt_embeds`.

        Where the model masks padding, `attention_mask` of them is the call's `prompt_attention_mask`.

        Args:
            texts: a prompt, a list of them, or a list for each text encoder, of as many each.

        Raises:
            ValueError: another number of lists, or the folder lacks an encoder that this model cannot do without.
        """
        texts = [texts] if isinstance(texts, str) else texts
        each = [text for text in texts if not isinstance(text, str)]
        each = each or [[text for text in texts if isinstance(text, str)]] * self.family.num_prompts
        if len(each) != self.family.num_prompts or len({len(prompts) for prompts in each}) > 1:
            sizes, needed = [len(prompts) for prompts in each], self.family.num_prompts
            raise ValueError(
                f"encode_prompt takes {needed} lists of as many prompts, or one prompt, got lists of {sizes}."
            )
        length = max_sequence_length or self.family.defaults.max_sequence_length
        if clip_skip:
            self._check_clip_skip(clip_skip)
        return self.family.encode(self.networks.encode, Texts(prompts=each, length=length, clip_skip=clip_skip))

    def _check_clip_skip(self, clip_skip: int) -> None:
        """Raises ValueError where a CLIP of the folder has no so many layers to leave out, or the model has no CLIP."""
        clips = [name for name, spec in self.family.components.items() if spec in (CLIP, CLIP_PROJECTED)]
        if not clips:
            raise ValueError(f"{clip_skip=}, but a {self.pipeline_class} has no CLIP encoder.")
        depths = [self.networks.config(name).num_hidden_layers for name in clips if name in self.networks]
        if depths and not 0 <= clip_skip < (depth := min(depths)):
            raise ValueError(f"{clip_skip=} must be from 0 to {depth - 1}: the CLIP encoder has {depth} layers.")

    def decode(
        self,
        latents: Float[np.ndarray, "B C F h w"],
        *,
        tiling: bool = False,
        progress: bool = False,
        on_frames: OnFrames | None = None,
    ) -> Float[np.ndarray, "B frames H W 3"]:
        """Frames, in [0, 1], of latents as the sampler leaves them. A picture is one frame.

        Devices of this process share lines of pixels.

        Args:
            tiling: decode in tiles, as its autoencoder has them (`vae.tiles`).
            progress: show a bar of frames, or of frames of tiles.
            on_frames: called with the frames of each chunk. What it raises ends the decoding, and leaves nothing.
        """
        self.check_vae()
        vae, nfhwc = self.networks["vae"], np.asarray(latents, np.float32).transpose(0, 2, 3, 4, 1)
        count, out = self.networks.config("vae").num_frames(latents.shape[2]), None
        tiles = self.tiles(tiling)
        parts, words = len(parts_of(nfhwc[0], tiles)), {"desc": "decode", "unit": "frame", "disable": not progress}
        if parts > 1:
            words["desc"] = f"decode {parts} tiles"
        with tqdm(total=len(nfhwc) * count * parts, **words) as bar:
            for number, video in enumerate(nfhwc):
                at = 0
                for frames in frames_of(vae, video, self.put_image, tiles, bar.update):
                    out = np.empty((len(nfhwc), count, *frames.shape[1:]), np.float32) if out is None else out
                    out[number, at : at + len(frames)] = frames
                    if on_frames is not None:
                        on_frames(number, at, frames)
                    at += len(frames)
        assert out is not None
        return out

    def tiles(self, tiling: bool) -> Tiles | None:
        """Those that the autoencoder decodes in.

        Raises:
            ValueError: the autoencoder's do not meet.
        """
        return self.networks.config("vae").tiles() if tiling else None

    def put_image(self, x: Float[np.ndarray, "*dims h w C"]) -> Any:
        """As the VAE takes it."""
        return x if self.own_mesh is None else self.own_mesh.put_image(x)

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
