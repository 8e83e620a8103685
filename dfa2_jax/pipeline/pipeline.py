"""From a prompt to an image: `Pipeline`, with diffusers' argument names and meanings."""

import inspect
import time
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tqdm import tqdm

from dfa2_jax.families.base import Embeddings
from dfa2_jax.families.registry import FAMILIES, open_checkpoint
from dfa2_jax.families.sd3.transformer import PositionTable
from dfa2_jax.nn.layers import sinusoid
from dfa2_jax.pipeline.components import Component, Networks
from dfa2_jax.pipeline.output import Output, density, metadata
from dfa2_jax.pipeline.request import Request, resolve, seeds_of
from dfa2_jax.pipeline.timing import Clock
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.setting import AttentionLayer, Setting
from dfa2_jax.sampling.loop import Inputs, PlanRows, SkipGuidance, denoise, denoise_planned, pad_steps
from dfa2_jax.sampling.memory import empty_caches
from dfa2_jax.sampling.schedule import torch_randn
from dfa2_jax.sampling.tokens import patchify, unpatchify
from dfa2_jax.weights.checkpoint import Checkpoint

Prompt = str | list[str] | None
Callback = Callable[["Pipeline", int, float, dict[str, np.ndarray]], dict[str, np.ndarray] | None]


class Prepared(NamedTuple):
    """A checked call with its prompts encoded: patchified latents [B, V, P] to start from, rows and columns of them."""

    request: Request
    tokens: np.ndarray
    seeds: list[int | None]
    inputs: Inputs
    rows: int
    columns: int


class Pipeline:
    """Text to image with SD3, SD3.5 or FLUX.1.

    Attributes:
        config: sizes of the transformer.
        fingerprint: of the transformer's stored weights.
        pipeline_class: diffusers' name of this kind of model.
        transformer: its graph and parameters.
        dtype: of the transformer.
        torch_rounding: round where torch does in `dtype`, to reproduce diffusers' 16-bit images (off: float32 sinusoids
            and latents, closer to the float32 image).
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: Any = None, torch_rounding: bool = False):
        self._networks = Networks(checkpoint, dtype)
        self.pipeline_class: str = checkpoint.pipeline_class
        self.torch_rounding = torch_rounding
        self.fingerprint: str = checkpoint.fingerprint
        self.config = checkpoint.config("transformer")
        checkpoint.check_scheduler()
        started = time.perf_counter()
        transformer: Any = checkpoint.load("transformer", dtype)
        self.dtype = transformer.dtype
        tables = jax.tree.leaves(nnx.pop(transformer, PositionTable))
        family: Any = FAMILIES[self.pipeline_class]
        self.family = family(self.config, checkpoint.configs["scheduler"], tables[0] if tables else None)
        self.transformer = Component(transformer)
        if "vae" in self._networks:
            self._networks["vae"]  # now, not after the first loop
        self.load_seconds = time.perf_counter() - started

    @classmethod
    def from_pretrained(
        cls, folder: str | PathLike[str], *, dtype: Any = None, torch_rounding: bool = False
    ) -> "Pipeline":
        """Open a diffusers folder, or one that `dfa2-convert` wrote. Text encoders are loaded when first needed.

        Args:
            dtype: None keeps the checkpoint's, except T5 and VAE stored in float16 (they overflow) and float32 on CPU.
            torch_rounding: see `Pipeline`.

        Raises:
            CheckpointError: what is wrong with which file.
        """
        return cls(open_checkpoint(folder), dtype=dtype, torch_rounding=torch_rounding)

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
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        seed: int | list[int] = 0,
        latents: Any = None,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
        skip_guidance_layers: list[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_start: float = 0.01,
        skip_layer_guidance_stop: float = 0.2,
        plan: Plan | None = None,
        callback_on_step_end: Callback | None = None,
        output_type: str = "pil",
        progress: bool = True,
    ) -> Output:
        """Sample images.

        Arguments that diffusers has mean what they mean there. None takes the model's own value. Beside those:

        Args:
            seed: an int draws the whole batch at once, as diffusers does with one CPU generator; a list gives each
                image its own. Either way the noise is torch's.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}); may return other latents.
            output_type: "pil", "np" or "latent".
            plan: which heads attend in full, inside an arrow, or not at all at which step (`calibrate`). It decides
                size, steps, sequence length and guidance scale where those are None; only the last may differ.
            progress: show a bar, one step at a time; the numbers are those of the whole loop.

        Raises:
            ValueError: an argument that this model, this folder, the plan or another argument rules out.
            MemoryError: the outputs that a plan keeps from step to step do not fit.
        """
        args = {name: value for name, value in locals().items() if name != "self"}
        clock = Clock()
        call = self.prepare(**args)
        if plan is not None:
            plan.check(self.setting_of(call))
        clock.lap("encode")
        tokens = self._denoise(call, plan, callback_on_step_end, progress)
        clock.lap("denoise")
        images = self.images(tokens, call)
        clock.lap("decode")

        timings = clock.seconds | {"per_step": clock.seconds["denoise"] / call.request.steps}
        kept = density(plan, call.inputs.skip)
        return Output(images, call.seeds, timings, metadata(self, args, call.request, call.seeds, kept))

    def setting(self, **arguments: Any) -> Setting:
        """What a plan is bound to, of a call with these arguments: `Plan.full(pipeline.setting(prompt=...))`.

        Raises:
            ValueError: as in a call.
        """
        return self.setting_of(self.prepare(**arguments))

    def prepare(self, **arguments: Any) -> "Prepared":
        """A call's arguments, checked and encoded.

        Raises:
            ValueError: as in a call.
        """
        args = defaults() | arguments
        if (plan := args["plan"]) is not None:
            if not isinstance(plan, Plan):
                raise ValueError(f"plan={plan!r:.100} must be a Plan: Plan.load(path) reads one.")
            told = {"num_inference_steps"} if args["sigmas"] is not None else set()
            told |= {name for name, value in args.items() if value is not None}
            args = args | {name: value for name, value in self._planned(plan).items() if name not in told}
        request = resolve(args, self.family, self._multiple, self._default_size, self._num_layers)
        rows, columns = request.height // self._multiple, request.width // self._multiple
        if request.output_type != "latent":
            self._need_vae()
        tokens, seeds = self._start(request, args["latents"], args["seed"], rows, columns)
        inputs = self._inputs(request, rows, columns)
        if request.skip_layers is not None:
            options = (args[f"skip_layer_guidance_{name}"] for name in ("scale", "start", "stop"))
            inputs = inputs._replace(skip=self._skip(request, *options))
        return Prepared(request, tokens, seeds, inputs, rows, columns)

    def _planned(self, plan: Plan) -> dict[str, Any]:
        """What a plan says where a call says nothing."""
        setting = plan.setting
        length = setting.layers[0].num_text - self.family.clip_tokens(self._networks)
        found = {
            "height": setting.height,
            "width": setting.width,
            "num_inference_steps": setting.num_inference_steps,
            "max_sequence_length": max(1, length),  # below 1 it is another model's plan: `Plan.check` says so
        }
        return found | ({} if plan.calibration is None else {"guidance_scale": plan.calibration.guidance_scale})

    def setting_of(self, call: "Prepared") -> Setting:
        request, text = call.request, call.inputs.text
        layers = self.config.attention_layers(text.shape[1], call.rows * call.columns)
        return Setting(
            pipeline_class=self.pipeline_class,
            weights=self.fingerprint,
            scheduler=self._networks.configs["scheduler"].get("_class_name", ""),
            sigmas=tuple(float(sigma) for sigma in call.inputs.sigmas[: request.steps + 1]),
            height=request.height,
            width=request.width,
            doubled_batch=request.scale is not None,
            num_heads=self.config.num_attention_heads,
            layers=tuple(
                AttentionLayer(
                    name=name,
                    num_text=layout.num_text,
                    num_visual=layout.num_visual,
                    text_first=layout.text_first,
                )
                for name, layout in layers.items()
            ),
        )

    def encode_prompt(
        self, texts: list[list[str]], *, max_sequence_length: int | None = None, clip_skip: int = 0
    ) -> Embeddings:
        """Embeddings of prompts, one list per text encoder, to be passed as `prompt_embeds` and `pooled_prompt_embeds`.

        Raises:
            ValueError: the folder lacks an encoder that this model cannot do without.
        """
        length = max_sequence_length or self.family.defaults.max_sequence_length
        depth = self._networks.configs.get("text_encoder", {}).get("num_hidden_layers", clip_skip + 1)
        if not 0 <= clip_skip < depth:
            raise ValueError(f"{clip_skip=} must be from 0 to {depth - 1}: the CLIP encoder has {depth} layers.")

        return self.family.encode(self._networks.encode, texts, length, clip_skip)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images, float32 [B, H, W, 3] in [0, 1], of latents [B, C, h, w] as the sampler leaves them.

        One image at a time: another batch size compiles nothing, and activations stay those of one image.
        """
        self._need_vae()
        vae = self._networks["vae"]
        nhwc = np.asarray(latents, np.float32).transpose(0, 2, 3, 1)
        decoded = [np.asarray(vae(image[None], method="decode"), np.float32) for image in nhwc]
        return np.clip(np.concatenate(decoded) / 2 + 0.5, 0, 1)

    def _need_vae(self) -> None:
        if "vae" not in self._networks:
            raise ValueError('The folder has no vae: only output_type="latent" is possible.')

    @property
    def _vae_scale(self) -> int:
        vae = self._networks.configs.get("vae", {"block_out_channels": [None] * 4})
        return 2 ** (len(vae["block_out_channels"]) - 1)

    @property
    def _multiple(self) -> int:
        """Image pixels along a side of one token."""
        return self._vae_scale * self.config.patch_size

    @property
    def _default_size(self) -> int:
        return self.family.default_latent_size * self._vae_scale

    @property
    def _num_layers(self) -> int:
        return self.config.num_layers

    def _start(self, request: Request, latents: Any, seed: int | list[int], rows: int, columns: int) -> tuple:
        """Patchified latents [B, V, P] to start from, and the seed of each image."""
        if latents is not None:
            return self._given_tokens(latents, request, rows, columns), [None] * request.batch
        seeds = seeds_of(seed, request.batch)
        patch = self.config.patch_size
        shape = (self.family.latent_channels, rows * patch, columns * patch)
        if np.ndim(seed) == 0:
            noise = torch_randn(seeds[0], (request.batch, *shape))
        else:
            noise = np.concatenate([torch_randn(one, (1, *shape)) for one in seeds])
        return patchify(noise, patch, self.family.order), seeds

    def _given_tokens(self, latents: Any, request: Request, rows: int, columns: int) -> np.ndarray:
        tokens = self.family.input_tokens(np.asarray(latents, np.float32), rows, columns)
        if len(tokens) != request.batch:
            raise ValueError(f"{len(tokens)} latents for a batch of {request.batch} images.")
        return tokens

    def _embed(self, request: Request) -> Embeddings:
        """[unconditional, conditional] embeddings of every image, in the transformer's dtype."""
        sides = [request.positive] if request.negative is None else [request.negative, request.positive]
        embedded = []
        for prompts in sides:
            if prompts.embeddings is None:
                skip = request.clip_skip if prompts is request.positive else 0  # diffusers leaves the negative as it is
                assert prompts.texts is not None
                one = self.encode_prompt(prompts.texts, max_sequence_length=request.length, clip_skip=skip)
            else:
                one = prompts.embeddings
            embedded.append(Embeddings(*(np.repeat(x, request.images_per_prompt, axis=0) for x in one)))
        shapes = [one.text.shape for one in embedded]
        if len(set(shapes)) > 1:
            raise ValueError(f"Negative and positive prompt embeddings differ in shape: {shapes[0]} and {shapes[1]}.")
        return Embeddings(*(np.concatenate(x).astype(self.dtype) for x in zip(*embedded, strict=True)))

    def _inputs(self, request: Request, rows: int, columns: int) -> Inputs:
        text, pooled = self._embed(request)
        sigmas = self.family.sigmas(request.sigmas, request.steps, rows * columns)
        scalar_dtype = self.dtype if self.torch_rounding else np.dtype(np.float32)
        timesteps = self.family.model_timesteps(sigmas[:-1] * np.float32(1000), scalar_dtype)
        guidance = self.family.embedded_guidance(request.guidance_scale, scalar_dtype)
        return Inputs(
            text=text,
            pooled=pooled,
            positions=self.family.positions(text.shape[1], rows, columns),
            sigmas=pad_steps(sigmas, extra=1),
            timesteps=pad_steps(sinusoid(timesteps)),
            guidance=None if guidance is None else sinusoid(guidance),
            guidance_scale=None if request.scale is None else np.asarray(request.scale, np.float32),
            skip=None,
        )

    def _skip(self, request: Request, scale: float, start: float, stop: float) -> SkipGuidance:
        step = np.arange(request.steps)
        return SkipGuidance(
            layers=np.isin(np.arange(self._num_layers), request.skip_layers or []),
            scale=np.asarray(scale, np.float32),
            active=pad_steps((step > request.steps * start) & (step < request.steps * stop)),
        )

    def _denoise(self, call: "Prepared", plan: Plan | None, callback: Callback | None, progress: bool) -> np.ndarray:
        """All steps at once, or one at a time when someone watches: calls of the same program, so the same numbers."""
        run, tokens, caches = self.denoiser(call, plan)
        steps = call.request.steps
        if callback is None and not progress:
            return np.asarray(run(tokens, caches, 0, steps)[0])

        timesteps = np.asarray(call.inputs.sigmas) * 1000
        for i in tqdm(range(steps), desc="denoise", disable=not progress):
            tokens, caches = jax.block_until_ready(run(tokens, caches, i, i + 1))
            if callback is not None:
                seen = {"latents": np.array(self.family.output_latents(np.asarray(tokens), call.rows, call.columns))}
                returned = seen if (result := callback(self, i, float(timesteps[i]), seen)) is None else result
                if not isinstance(returned, dict) or set(returned) - {"latents"}:
                    raise ValueError(
                        f"callback_on_step_end must return a dict of 'latents' alone, got {returned!r:.200}"
                    )
                latents = np.asarray(returned.get("latents", seen["latents"]), np.float32)  # changed in place, perhaps
                tokens = self._given_tokens(latents, call.request, call.rows, call.columns)
        return np.asarray(tokens)

    def denoiser(
        self, call: "Prepared", plan: Plan | None, implementation: str | None = None, *, skip: bool = True
    ) -> tuple[Callable[..., tuple[Any, Any]], Any, Any]:
        """(run, tokens, caches): `run(tokens, caches, start, stop)` gives both after these steps.

        Args:
            implementation: of attention, to measure what another order of the same sums changes; None: the best one.
            skip: as in `denoise_planned`.
        """
        transformer, tokens = self.transformer, call.tokens
        options: dict[str, Any] = {"inputs": jax.device_put(call.inputs), "rounding": self.rounding}
        options["implementation"] = implementation
        if self.rounding is not None:
            tokens = tokens.astype(self.dtype).astype(np.float32)
        if plan is None:
            dense = partial(denoise, transformer.graph, transformer.params, **options)
            return lambda tokens, caches, start, stop: (dense(tokens, start=start, stop=stop), caches), tokens, None
        rows = PlanRows(pad_steps(plan.half_windows()), pad_steps(plan.head_order()))
        options |= {"plan": jax.device_put(rows), "skip": skip}
        planned = partial(denoise_planned, transformer.graph, transformer.params, **options)

        def run(tokens: Any, caches: Any, start: int, stop: int) -> tuple[Any, Any]:
            return planned(latents=tokens, caches=caches, start=start, stop=stop)

        text, images = call.inputs.text, call.request.batch
        size = (text.shape[1], tokens.shape[1], len(text))
        return run, tokens, empty_caches(self.config, *size, self.dtype, images=images)

    @property
    def rounding(self) -> str | None:
        return self.dtype.name if self.torch_rounding and self.dtype != jnp.float32 else None

    def images(self, tokens: np.ndarray, call: "Prepared") -> Any:
        """Of patchified latents [B, V, P], in the form that the call asks for."""
        output_type, rows, columns = call.request.output_type, call.rows, call.columns
        if output_type == "latent":
            return self.family.output_latents(tokens, rows, columns)
        images = self.decode(unpatchify(tokens, self.config.patch_size, self.family.order, rows, columns))
        if output_type == "np":
            return images
        return [Image.fromarray(pixels) for pixels in (images * 255).round().astype(np.uint8)]


def defaults() -> dict[str, Any]:
    """Of `Pipeline.__call__`."""
    parameters = list(inspect.signature(Pipeline.__call__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}
