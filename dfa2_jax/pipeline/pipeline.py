"""From a prompt to an image: `Pipeline`, with diffusers' argument names and meanings."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from os import PathLike
from typing import Any, NoReturn

import jax
import numpy as np

from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.hub import find_model
from dfa2_jax.io.names import check_names, names_of, suggests_names
from dfa2_jax.nn.attention import Attend
from dfa2_jax.options import Options, Prompt, described
from dfa2_jax.pipeline.adapters import Adaptable
from dfa2_jax.pipeline.ahead import compile_ahead, compile_decoder, counts_memory
from dfa2_jax.pipeline.call import Call, prepare
from dfa2_jax.pipeline.health import faults_of
from dfa2_jax.pipeline.output import Output, density, metadata
from dfa2_jax.pipeline.request import Request, resolve
from dfa2_jax.pipeline.timing import Clock
from dfa2_jax.plan.method import PlanError
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.setting import Setting

logger = logging.getLogger("dfa2_jax")

Callback = Callable[["Pipeline", int, float, dict[str, np.ndarray]], dict[str, np.ndarray] | None]
FramesCallback = Callable[["Pipeline", int, int, np.ndarray], Any]


class Pipeline(Adaptable):
    """Text to image or video with a model of one of the known families.

    Attributes: those of `Loaded`.
    """

    @classmethod
    @suggests_names
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        dtype: Any = None,
        text_encoder_dtype: Any = None,
        devices: int | str | Sequence[Any] | None = None,
        shard_weights: bool = False,
        torch_rounding: bool = False,
        verify: bool = True,
    ) -> "Pipeline":
        """Open a diffusers folder, or one that `dfa2-convert` wrote. Text encoders are loaded when first needed.

        Args:
            folder: of the whole pipeline, or the hub id of a folder in the cache of huggingface_hub.
            dtype: None keeps the checkpoint's, except T5 and VAE stored in float16 (they overflow) and float32 on CPU.
                "float8" and "int8" quantise the transformer's blocks, weights and activations; "int8_weights" weights
                alone, for memory.
            text_encoder_dtype: another one for text encoders; "int8_weights" halves T5, and leaves CLIPs as they are.
            devices: that share the transformer's work on each batch: their number, "all", or some of JAX's. None: the
                default one. Encoders run on the first, and all share the lines of pixels that the VAE decodes.
            shard_weights: devices hold equal shares of blocks' and text encoders' weights, and gather each where it is
                read.
            torch_rounding: round where torch does in `dtype`, to reproduce diffusers' 16-bit images. False keeps
                sinusoids and latents in float32, closer to the float32 image.
            verify: compare a converted folder's weights with their checksums as they are read.

        Raises:
            CheckpointError: what is wrong with which file.
            MemoryError: the transformer's or the VAE's weights do not fit on a device; none of theirs was read.
        """
        checkpoint = open_checkpoint(find_model(folder), verify=verify)
        options: dict[str, Any] = {"text_encoder_dtype": text_encoder_dtype, "torch_rounding": torch_rounding}
        return cls(checkpoint, dtype=dtype, devices=devices, shard_weights=shard_weights, **options)

    def to(self, *args: Any, **kwargs: Any) -> NoReturn:
        """diffusers' way to a GPU, which JAX has not.

        Raises:
            NotImplementedError: says where the weights are, and how another device is chosen.
        """
        raise NotImplementedError(
            f"pipeline.to({', '.join(map(repr, args))}): the weights are on JAX's default device, {jax.devices()[0]}, "
            f"of jax.devices()={jax.devices()}. CUDA_VISIBLE_DEVICES or JAX_PLATFORMS chooses another before Python "
            "starts. Several devices, and a dtype, are arguments of from_pretrained."
        )

    def __repr__(self) -> str:
        parts = ", ".join(name for name in self.networks.configs if name != "scheduler")
        layers, (height, width) = len(self.config.calls(1, 1)), self.sizes.image
        what = "images" if self.sizes.num_frames is None else f"videos of {self.sizes.num_frames} frames"
        loras = "".join(f"\n  LoRA {name}: scale {lora['scale']:g}" for name, lora in self.loras.items())
        return (
            f"Pipeline({self.pipeline_class}, {self.precision or self.dtype.name}, weights {self.fingerprint[:12]})\n"
            f"  transformer: {layers} attention layers of {self.config.num_attention_heads} heads, "
            f"head_dim {self.config.attention_head_dim}\n"
            f"  components: {parts}; {what} of {height} x {width} px, sides by {self.sizes.multiple}{loras}"
        )

    @suggests_names
    @described(Options)
    def __call__(
        self,
        prompt: Prompt = None,
        *,
        prompt_2: Prompt = None,
        prompt_3: Prompt = None,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        negative_prompt_3: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
        scheduler: str | Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
        use_dynamic_cfg: bool = False,
        true_cfg_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        seed: int | list[int] = 0,
        latents: Any = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        prompt_attention_mask: Any = None,
        negative_prompt_attention_mask: Any = None,
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
        skip_guidance_layers: list[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_start: float = 0.01,
        skip_layer_guidance_stop: float = 0.2,
        plan: Plan | None = None,
        attend: Attend | None = None,
        callback_on_step_end: Callback | None = None,
        vae_tiling: bool = False,
        callback_on_frames: FramesCallback | None = None,
        fps: int | None = None,
        output_type: str = "pil",
        progress: bool = True,
    ) -> Output:
        """Sample images or videos. Arguments that diffusers has mean what they mean there.

        Args:
            {options}

        Raises:
            ValueError: an argument that this model, this folder, the plan or another argument rules out.
            MemoryError: what attention keeps from step to step does not fit, or what decoding takes; no step was run.
        """
        options = Options(**{name: value for name, value in locals().items() if name != "self"})
        return self.sample(options)

    def sample(self, options: Options, phase: Callable[[str], AbstractContextManager[None]] = nullcontext) -> Output:
        """As a call of the pipeline with these options.

        Args:
            phase: entered with its name around all but the loop, which has its bar (`timing.told`).
        """
        clock = Clock()
        with phase("encoding"):
            call = self.prepare(options)
            if options.plan is not None:
                options.plan.check(call.setting)
        clock.lap("encode")
        if options.progress:  # a bar starts after compilation
            with phase("compiling"):
                call = compile_ahead(call)
            clock.lap("compile")
        elif counts_memory(call):
            call = compile_decoder(call)
            clock.lap("compile")
        tokens = call.run()
        clock.lap("denoise")
        is_video = call.request.num_frames is not None  # whose decoder has a bar
        with nullcontext() if is_video else phase("decoding"):
            images = call.images(tokens)
        clock.lap("decode")
        timings = clock.seconds | {"per_step": clock.seconds["denoise"] / call.num_steps(call.plan)}
        faults = faults_of(call, tokens, images)
        for fault in faults:
            logger.warning("%s", fault)
        made = metadata(self, call.options, call.request) | {"density": density(call)}
        if faults:
            made["faults"] = [*faults]
        output = Output(images, call.seeds, timings, made, faults)
        return replace(output, images=None, frames=images) if is_video else output

    def setting(self, **arguments: Any) -> Setting:
        """What a plan is bound to, of a call with these arguments: `Plan.full(pipeline.setting(prompt=...))`.

        Raises:
            TypeError: a name that no call takes, with the nearest one.
            ValueError: as in a call.
        """
        check_names("Pipeline.setting", arguments, names_of(Options))
        return self.prepare(Options(**arguments)).setting

    def prepare(self, options: Options) -> Call:
        """A call with these options, checked and encoded.

        Raises:
            ValueError: as in a call.
        """
        request = self.request(options)
        return prepare(self, self.guided(options), request)

    def guided(self, options: Options) -> Options:
        """These options with the guidance that their plan decides: metadata say it, too."""
        planned = self._planned(options)
        return replace(options, use_dynamic_cfg=planned.use_dynamic_cfg, true_cfg_scale=planned.true_cfg_scale)

    def request(self, options: Options) -> Request:
        """A call with these options, checked and with every default filled in.

        Raises:
            ValueError: as in a call.
        """
        request = resolve(self._planned(options), self.family, self.sizes, self.scheduler)
        if request.output_type != "latent":
            self.check_vae()
            self.tiles(options.vae_tiling)
        if options.max_sequence_length is not None and not request.encodes_text:
            length = options.max_sequence_length
            logger.warning("max_sequence_length=%d has no effect: embeddings have lengths of their own.", length)
        return request

    def _planned(self, options: Options) -> Options:
        """With what the plan says where the call says nothing."""
        plan = options.plan
        if plan is None:
            return options
        if not isinstance(plan, Plan):
            raise ValueError(f"plan={plan!r:.100} must be a Plan: Plan.load(path) reads one.")
        setting = plan.setting
        if setting.pipeline_class != self.pipeline_class:
            raise PlanError(f"the plan is of a {setting.pipeline_class:.100}, and this is a {self.pipeline_class}.")
        length = setting.layers[0].num_text - setting.num_reference - self.family.extra_text_tokens(self.networks)
        said: dict[str, Any] = {
            "height": setting.height,
            "width": setting.width,
            "num_frames": setting.num_frames,
            "num_inference_steps": None if options.sigmas is not None else setting.num_inference_steps,
            "scheduler": setting.scheduler or None,
            "max_sequence_length": max(1, length),  # below 1 it is another model's plan: `Plan.check` says so
        }
        record = plan.calibration or plan.step_calibration
        if record is not None:
            said["guidance_scale"] = record.guidance_scale
        given = {name: value for name, value in said.items() if getattr(options, name) is None}
        if record is not None and options.true_cfg_scale == Options.true_cfg_scale:
            given["true_cfg_scale"] = record.true_cfg_scale
        return replace(options, **given, use_dynamic_cfg=options.use_dynamic_cfg or setting.use_dynamic_cfg)
