"""Every argument of a call, typed, described once: the signatures, `help`, and the command line's flags follow from it.

Imports neither JAX nor NumPy, so that `dfa2 --help` answers at once.
"""

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from os import PathLike
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeVar

from dfa2_jax.io.errors import CheckpointError, read_json
from dfa2_jax.weights.dtypes import FLOAT_DTYPES, PRECISIONS

if TYPE_CHECKING:  # annotations only: these import JAX
    from dfa2_jax.nn.attention import Attend
    from dfa2_jax.plan.plan import Plan

Prompt = str | list[str] | None
Values = TypeVar("Values")
Function = TypeVar("Function", bound=Callable[..., Any])


def option(default: Any, description: str, *, flag: bool | str = False, **words: Any) -> Any:
    """A field with its description.

    Args:
        flag: whether the command line has it, by the field's name or by another one.
        words: argparse's own, such as `nargs`. What is not said follows from the field: type, default, help.
    """
    return field(default=default, metadata={"description": description, "flag": flag, "words": words})


def scheduler_of(text: str) -> str | dict[str, Any]:
    """A scheduler's name, or what its scheduler_config.json holds."""
    if not text.endswith(".json"):
        return text
    try:
        return read_json(Path(text))
    except (CheckpointError, OSError) as error:
        raise ArgumentTypeError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `Pipeline.__call__`. Those that diffusers has mean what they mean there."""

    prompt: Prompt = option(
        None,
        "text, or a list of texts: one image each",
        flag=True,
        action="append",
        help="text; may be repeated",
    )
    prompt_2: Prompt = option(None, "for the second text encoder; None: `prompt`", flag=True, action="append")
    prompt_3: Prompt = option(None, "for the third text encoder (SD3); None: `prompt`", flag=True, action="append")
    negative_prompt: Prompt = option(
        None,
        "what guidance moves away from; one for all prompts, or one each",
        flag=True,
        help="what guidance moves away from, for all prompts",
    )
    negative_prompt_2: Prompt = option(None, "for the second text encoder; None: `negative_prompt`", flag=True)
    negative_prompt_3: Prompt = option(None, "for the third text encoder (SD3); None: `negative_prompt`", flag=True)
    height: int | None = option(None, "pixels; None: the model's own size", flag=True, metavar="PX")
    width: int | None = option(None, "pixels; None: the model's own size", flag=True, metavar="PX")
    num_frames: int | None = option(
        None,
        "frames of a video; None: the model's own number (CogVideoX 49, 1.5: 81, HunyuanVideo 129)",
        flag=True,
        metavar="FRAMES",
    )
    num_inference_steps: int | None = option(
        None,
        "steps of the sampling loop; None: 28, 4 for FLUX.1-schnell, 50 for CogVideoX and HunyuanVideo",
        flag="--steps",
    )
    sigmas: Sequence[float] | Any | None = option(
        None,
        "noise levels in (0, 1], one per step, before the shift",
        flag=True,
        nargs="+",
        type=float,
        metavar="SIGMA",
    )
    scheduler: str | Mapping[str, Any] | None = option(
        None,
        "diffusers' name of another scheduler, or a scheduler_config; None: the folder's. "
        "FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler; "
        "CogVideoXDDIMScheduler, CogVideoXDPMScheduler",
        flag=True,
        type=scheduler_of,
        metavar="NAME|FILE.json",
    )
    guidance_scale: float | None = option(
        None, "SD3, CogVideoX: classifier-free; FLUX.1-dev, HunyuanVideo: embedded. None: 7, 6, 3.5, 6", flag=True
    )
    use_dynamic_cfg: bool = option(
        False, "another guidance scale at each step, as CogVideoX's model cards have it", flag=True, action="store_true"
    )
    true_cfg_scale: float = option(
        1.0, "classifier-free guidance for FLUX.1 and HunyuanVideo; needs a negative prompt", flag=True
    )
    num_images_per_prompt: int = option(
        1, "images of each prompt", flag=True, help="images of each prompt, of as many seeds from --seed on"
    )
    seed: int | list[int] = option(
        0,
        "an int draws the whole batch, as one CPU generator does in diffusers; a list gives each image its own",
        flag=True,
        nargs="+",
        help="each prompt is sampled from each seed",
    )
    latents: Any = option(None, "latents to start from, as diffusers takes them, in place of noise")
    image: Any = option(
        None,
        "a picture to start from, in place of noise: Pillow's, a path, an array [H, W, 3] in [0, 1], or latents; or a "
        "list, one for each image (FLUX.1, SD3)",
        flag=True,
        type=Path,
        metavar="FILE",
        help="a picture to start from, in place of noise (FLUX.1, SD3)",
    )
    mask_image: Any = option(
        None,
        "what is painted anew, white; black stays as `image` has it. As `image`, of one channel",
        flag=True,
        type=Path,
        metavar="FILE",
    )
    strength: float | None = option(
        None, "of noise over `image`, from 0 to 1, which leaves out as many of the first steps; None: 0.6", flag=True
    )
    prompt_embeds: Any = option(None, "text states [B, T, E] in place of `prompt`")
    pooled_prompt_embeds: Any = option(None, "pooled text [B, P], together with `prompt_embeds`")
    negative_prompt_embeds: Any = option(None, "text states [B, T, E] in place of `negative_prompt`")
    negative_pooled_prompt_embeds: Any = option(None, "pooled text [B, P], together with `negative_prompt_embeds`")
    prompt_attention_mask: Any = option(
        None, "[B, T], 1 for tokens of `prompt_embeds` and 0 for the padding after them (HunyuanVideo)"
    )
    negative_prompt_attention_mask: Any = option(None, "[B, T], as `prompt_attention_mask`")
    max_sequence_length: int | None = option(
        None,
        "tokens of T5, or of Llama, at most 512; None: 256 (SD3, schnell, HunyuanVideo), 512 (dev) or 226 (CogVideoX)",
        flag=True,
        metavar="TOKENS",
    )
    clip_skip: int | None = option(None, "last layers of CLIP to leave out (SD3)", flag=True, metavar="LAYERS")
    skip_guidance_layers: list[int] | None = option(
        None, "blocks that skip-layer guidance leaves out; SD3.5-medium: 7 8 9", flag=True, nargs="+", metavar="LAYER"
    )
    skip_layer_guidance_scale: float = option(2.8, "strength of skip-layer guidance", flag=True)
    skip_layer_guidance_start: float = option(0.01, "share of the steps before skip-layer guidance starts", flag=True)
    skip_layer_guidance_stop: float = option(0.2, "share of the steps after which skip-layer guidance ends", flag=True)
    plan: "Plan | None" = option(
        None,
        "which steps run, and what each head does at them (`calibrate`). It decides size, steps, scheduler, sequence "
        "length and guidance scale where those are None. The last may differ; where heads are full, size and sequence "
        "length too",
        flag=True,
        help="from dfa2 calibrate; it decides size, steps, scheduler and sequence length too",
        type=Path,
        metavar="FILE",
    )
    attend: "Attend | None" = option(
        None, "your own attention in place of ours (`nn.attention.Attend`); not with `plan`"
    )
    callback_on_step_end: Callable[..., Any] | None = option(
        None, 'called as (pipeline, step, timestep, {"latents": ...}); may return other latents'
    )
    vae_tiling: bool = option(
        False,
        "decode in overlapping tiles, as diffusers' enable_tiling does: less memory, and other pixels",
        flag=True,
    )
    callback_on_frames: Callable[..., Any] | None = option(
        None,
        "called as (pipeline, video, first, frames) as each chunk of a video is decoded: the number of the video, the "
        "number of its first new frame, and the new frames, uint8 [F, H, W, 3]",
    )
    fps: int | None = option(
        None,
        "frames a second of a video's file; None: the model's own (CogVideoX 8, 1.5: 16, HunyuanVideo 24)",
        flag=True,
    )
    output_type: str = option("pil", '"pil", "np" or "latent"')
    progress: bool = option(True, "show a bar, one step at a time; the numbers are those of the whole loop")

    def __post_init__(self) -> None:
        if self.plan is not None and self.attend is not None:
            raise ValueError("plan and attend both say what attention does: pass one of them.")


CALL = (
    "negative_prompt",
    "num_inference_steps",
    "scheduler",
    "height",
    "width",
    "num_frames",
    "guidance_scale",
    "use_dynamic_cfg",
    "true_cfg_scale",
    "max_sequence_length",
    "image",
    "mask_image",
)
"""The `Options` that a plan is found for: `calibrate` takes them too."""
CALL_FIELDS = [argument for argument in fields(Options) if argument.name in CALL]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The arguments of `calibrate` beside those of a call (`CALL`)."""

    speedup: float | None = option(
        None, "budget: times as fast as every step; the plan is as near to the dense images as can be", flag=True
    )
    psnr: float | None = option(
        None, "budget: dB that the plan's images keep against the dense ones; the plan is as fast as can be", flag=True
    )
    target: str = option(
        "dense",
        "what steps come near to: the dense images, or the converged ones of many more steps, for 4 dense runs more",
        flag=True,
        choices=("dense", "converged"),
    )
    heads: str = option(
        "auto",
        "beside a budget in speed or PSNR: whether heads are spared too. auto: where attention is 0.3 of a step and it "
        "pays; only: every step runs; full: steps alone",
        flag=True,
        choices=("auto", "only", "full"),
    )
    attention_share: float | None = option(
        None,
        "of a dense step's time on the GPU that will sample; None: attention's share of the multiplications",
        flag=True,
        metavar="SHARE",
    )
    delta: float | None = option(
        None,
        "budget: the paper's, of a layer's error at a step, for heads at every step; it tries 0.2 to 1.0. "
        "Larger: faster",
        flag=True,
    )
    c: float | None = option(
        1.5,
        "a head's error stays below c * delta / heads; None: no bound",
        flag=True,
        help="a head's error stays below c * delta / heads; 0: no bound",
    )
    windows: tuple[int, ...] = option(
        (8, 16, 32), "arrows to try, 1/f of the visual tokens wide", flag=True, nargs="*", metavar="F"
    )
    orders: tuple[str, ...] | None = option(
        None,
        "in which orders of tokens arrows run: native (frame, row, column), time (row, column, frame); None: both for "
        "videos",
        flag=True,
        nargs="+",
        choices=("native", "time"),
    )
    cache: bool = option(
        True, "whether heads may reuse their output of the step before", flag="--no-cache", help="arrows only"
    )
    seed: int = option(0, "of the noise of all prompts, one batch", flag=True)
    attention_chunk: int | None = option(
        None, "images whose candidate outputs a layer holds at once, to save memory", flag=True, metavar="IMAGES"
    )
    tiles: tuple[int, int] | None = option(
        None,
        "queries and keys of the tiles whose savings count; None: the paper's kernel's",
        flag=True,
        nargs=2,
        metavar=("QUERIES", "KEYS"),
    )
    progress: bool = option(True, "show phases with their times, and a bar")
    resume: str | PathLike[str] | None = option(None, "a file that keeps findings after every step, to go on from")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The arguments of `quality_report` beside folder, plans, prompts and limits."""

    seed: int | Sequence[int] = option(0, "every prompt is sampled from each seed", flag=True, nargs="+")
    negative_prompt: str | None = option(None, "for all prompts", flag=True)
    guidance_scale: float | None = option(None, "None: the first plan's", flag=True)
    batch: int = option(1, "images at a time", flag=True, metavar="N")
    dtype: Any = option(
        None,
        "of the plans' images; None: the checkpoint's, float32 on CPU",
        flag=True,
        choices=(*FLOAT_DTYPES, *PRECISIONS),
    )
    lpips: Any = option(
        None, "a .safetensors file of an lpips.LPIPS; needs dfa2-jax[quality]", flag=True, metavar="WEIGHTS"
    )
    clip: Any = option(
        None, "a folder of a transformers CLIPModel; needs dfa2-jax[quality]", flag=True, metavar="FOLDER"
    )
    image_reward: Any = option(None, "not supported: says why", flag=True, metavar="FOLDER")
    precisions: Sequence[str] = option(
        (), "lines of blocks in 8 bits, too: dense, and by their plans", flag=True, nargs="+", choices=PRECISIONS
    )
    quick: bool = option(False, "no noise floor and no heads, for a gate", flag=True)
    verify: bool = option(True, "compare a converted folder's weights with their checksums as they are read")
    progress: bool = option(True, "show phases with their times, and a bar")


def described(*groups: type | Iterable[Field[Any]]) -> Callable[[Function], Function]:
    """Puts descriptions in a docstring, in place of its line `{options}`: of all fields of a class, or of some."""

    def decorate(function: Function) -> Function:
        before, _, after = (function.__doc__ or "").partition("{options}")
        indent = before.rpartition("\n")[2]  # Python 3.13 takes off what all lines share
        parts = (fields(group) if isinstance(group, type) else group for group in groups)
        arguments = [argument for part in parts for argument in part]
        texts = [f"{argument.name}: {argument.metadata['description']}." for argument in arguments]
        filled = [fill(text, 112, initial_indent=indent, subsequent_indent=indent + "    ") for text in texts]
        function.__doc__ = before + "\n".join(filled).lstrip() + after
        return function

    return decorate
