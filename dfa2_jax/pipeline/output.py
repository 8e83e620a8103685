"""What a sampling call returns, what it says of itself, and how that makes it again."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dfa2_jax import __version__
from dfa2_jax.io.hub import model_name
from dfa2_jax.io.images import SUFFIXES, encode, stem_of, write_named, write_new
from dfa2_jax.io.names import of_names, suggests_names
from dfa2_jax.io.videos import SUFFIXES as VIDEO_SUFFIXES
from dfa2_jax.io.videos import as_array, check_video, encode_video
from dfa2_jax.options import Options
from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.loaded import Loaded
from dfa2_jax.pipeline.request import Request, seeds_of
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.suffix import from_step
from dfa2_jax.sampling.solvers.schedulers import EULER, SAMPLERS

LEFT_OUT = (
    *("progress", "output_type", "seed", "sigmas", "plan", "attend", "callback_on_step_end", "callback_on_frames"),
    *("image", "mask_image"),
)
"""Arguments that metadata leaves out, or gives in another form."""

UNWRITABLE = (
    *(".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl", ".ppm", ".ico", ".svg", ".pdf"),
    *(".png", ".jpg", ".jpeg", ".webp", ".apng", ".mp4", ".mov", ".mkv", ".webm", ".avi"),
)
"""Suffixes that ask for a file, and for one that we do not write."""

TEXTS = tuple(f"{side}prompt{n}" for side in ("", "negative_") for n in ("", "_2", "_3"))
ARRAYS = "embeds", "latents", "attention_mask"
"""Ends of the names of arguments that are arrays."""
CODE = ("attend", "callback_on_step_end")
"""Arguments that are the caller's own code."""


@dataclass(frozen=True)
class Output:
    """Images or videos, and how they came about.

    images: PIL images, or float32 [B, H, W, 3] in [0, 1], or latents as diffusers returns them; None of videos.
    seeds: one per image, None where the latents were given.
    timings: seconds of encode, denoise, per_step, decode, and of the compilation within them.
    metadata: what would make the same images again; JSON-serialisable.
    faults: what is wrong with which image, in words: numbers that are not finite, or a single value.
    frames: of videos: lists of PIL images, or float32 [B, F, H, W, 3], or latents as diffusers returns them.
    """

    images: Any
    seeds: list[int | None]
    timings: dict[str, float]
    metadata: dict[str, Any] = field(repr=False)
    faults: tuple[str, ...] = ()
    frames: Any = None

    @suggests_names
    def save(
        self,
        path: str | PathLike[str],
        *,
        format: str | None = None,
        numbers: Collection[int] | None = None,
        overwrite: bool = True,
    ) -> list[Path]:
        """Write images or videos that say how to make them again (`dfa2 again`), each whole or not at all.

        Args:
            path: a file for one of them, by its suffix, or a folder. Images become PNG, JPEG or WebP; videos WebP,
                AVIF, GIF, PNG, or MP4 with the extra `video`. GIF and MP4 say nothing of themselves. Files in a folder
                are named after prompt and seed, and replace no other file.
            format: of files in a folder; None: "png", and "webp" for videos.
            numbers: of the images or videos to write; None: all.
            overwrite: whether one file may take the place of another.

        Returns:
            The files, in their order.

        Raises:
            ValueError: latents are no images, a number or format is unknown, or one file is asked for several. JPEG has
                no room for the metadata, or a format does not take the size or the rate.
            MissingExtra: MP4 without the extra `video`.
            FileExistsError: the file is there, and may not be replaced.
            OSError: the disk.
        """
        path, is_video = Path(path), self.frames is not None
        formats = VIDEOS if is_video else IMAGES
        shown: Any = videos(self.frames) if is_video else pictures(self.images)
        numbers = range(len(shown)) if numbers is None else numbers
        if wrong := [number for number in numbers if number not in range(len(shown))]:
            raise ValueError(f"numbers={wrong} are none of these {len(shown)} {formats.what}: they are counted from 0.")
        kind = formats.of(path, format, len(numbers))
        if is_video:
            check_video(kind, self.metadata["fps"], (self.metadata["height"], self.metadata["width"]))
        files = []
        for i in numbers:
            made = image_metadata(self.metadata, i)
            words = made, parameters(made)
            if is_video:
                data = encode_video(as_array(shown[i]), kind, made["fps"], *words)
            else:
                data = encode(shown[i], kind, *words)
            if formats.names_file(path):
                write_named(path, data, overwrite)
                files.append(path)
            else:
                path.mkdir(parents=True, exist_ok=True)
                stem, (suffix, *_) = stem_of(made.get("prompt") or "", made["seed"]), formats.suffixes_of(kind)
                files.append(write_new(path, stem, suffix, data))
        return files


def pictures(images: Any) -> list[Image.Image]:
    """PIL images of what a call returned."""
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f'latents {list(images.shape)} are no images: sample with output_type="pil".')
        return [Image.fromarray(pixels) for pixels in (images * 255).round().astype(np.uint8)]
    return images


def videos(frames: Any) -> Any:
    """Videos that a call returned, each of PIL images or of numbers of 8 bits, made when it is asked for."""
    if not isinstance(frames, np.ndarray):
        return frames
    if frames.ndim != 5 or frames.shape[4] != 3:
        raise ValueError(f'latents {list(frames.shape)} are no videos: sample with output_type="pil".')
    return InBytes(frames)


@dataclass(frozen=True)
class InBytes:
    """Videos of float32, one at a time in 8 bits."""

    frames: Float[np.ndarray, "B F H W 3"]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, number: int) -> UInt8[np.ndarray, "F H W 3"]:
        return np.stack([(frame * 255).round().astype(np.uint8) for frame in self.frames[number]])


@dataclass(frozen=True)
class Formats:
    """Formats of files. what: they hold; suffixes: and the format of each; default: in a folder."""

    what: str
    suffixes: Mapping[str, str]
    default: str

    def names_file(self, path: Path) -> bool:
        """Whether a path names such a file, not a folder."""
        return path.suffix.lower() in self.suffixes and not path.is_dir()

    def suffixes_of(self, kind: str) -> list[str]:
        """The usual one comes first."""
        return [suffix for suffix, name in self.suffixes.items() if name == kind]

    def of(self, path: Path, format: str | None, count: int) -> str:
        """The format of `count` of them that are to be written to `path`.

        Raises:
            ValueError: an unknown format, or suffix and format, or file and count, disagree.
        """
        kinds = sorted({*self.suffixes.values()})
        if format is not None and format not in kinds:
            raise ValueError(f"{format=} is not one of {kinds}, which {self.what} can be written in.")
        if not self.names_file(path):
            if path.suffix.lower() in UNWRITABLE and not path.is_dir():
                written = ", ".join(self.suffixes)
                raise ValueError(
                    f"{path} has the suffix of a format that {self.what} are not written in: {written} are."
                )
            return format or self.default
        kind = self.suffixes[path.suffix.lower()]
        if count != 1:
            raise ValueError(f"{path} is one file for {count} {self.what}: give a folder.")
        if format not in (None, kind):
            raise ValueError(f"{path} is {kind} by its suffix, but {format=}: leave one of them out.")
        return kind


IMAGES, VIDEOS = Formats("images", SUFFIXES, "png"), Formats("videos", VIDEO_SUFFIXES, "webp")
EITHER = Formats("images or videos", SUFFIXES | VIDEO_SUFFIXES, "png")
"""Before it is known what a model makes."""


def density(call: Call) -> float | None:
    """The kept share of query-key pairs at the steps that a call runs, further forwards of its guidance included.

    None: of an attention of the user's own.
    """
    plan = call.plan
    if call.options.attend is not None:
        return None
    if plan is None:
        return 1.0
    pairs = sum(layer.layout.length**2 for layer in call.layers)
    guidance = call.inputs_for(plan).guidance
    every, more = guidance.sides * call.num_steps(plan) * pairs, guidance.extra_pairs(call.layers)
    return (plan.density() * every + more) / (every + more) if more else plan.density()


def metadata(pipeline: Loaded, options: Options, request: Request) -> dict[str, Any]:
    """What a call says of itself: options as resolved; arrays only by their shape, code only by its name."""
    values = {argument.name: getattr(options, argument.name) for argument in fields(options)}
    given = {
        name: f"array{list(np.shape(value))}" if name.endswith(ARRAYS) else plain(value)
        for name, value in values.items()
        if value is not None and name not in LEFT_OUT
    }
    if request.source is not None:
        shown = {name: where(values[name]) for name in ("image", "mask_image") if values[name] is not None}
        given |= {"strength": request.strength, "source": shown | {"digest": request.source.digest}}
    seeds, device = seeds_of(options.seed, request.batch), jax.devices()[0]
    resolved = {
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "fps": request.fps,
        "num_inference_steps": request.steps,
        "guidance_scale": plain(request.guidance_scale),
        "cfg_scale": plain(request.cfg_scale),
        "embedded_guidance": plain(request.guidance_scale) if getattr(pipeline.config, "guidance_embeds", 0) else None,
        "max_sequence_length": request.length if request.encodes_text else None,
        "seed": None if options.latents is not None else seeds if np.ndim(options.seed) else seeds[0],
        "plan": None if options.plan is None else options.plan.digest,
        "num_nodes": None if options.plan is None else len(from_step(options.plan, request.first).nodes),
        "scheduler": plain(options.scheduler or request.scheduler.get("_class_name")),
        "sigmas": None if request.sigmas is None else [float(sigma) for sigma in request.sigmas],
        "folder": str(pipeline.folder.absolute()),
        "pipeline": pipeline.pipeline_class,
        "fingerprint": pipeline.fingerprint,
        "folder_digest": pipeline.folder_digest,
        "requested_dtype": pipeline.requested_dtype,
        "text_encoder_dtype": pipeline.text_encoder_dtype,
        "dtype": pipeline.dtype.name,
        "torch_rounding": pipeline.torch_rounding,
        "device": f"{device.platform} {device.device_kind}",
        "versions": {"dfa2_jax": __version__, "jax": jax.__version__},
    }
    code = {name: repr(values[name]) for name in CODE if values[name] is not None}
    loras = {"loras": [adapter.content() for adapter in pipeline.checkpoint.adapters]}
    return given | resolved | code | (loras if loras["loras"] else {})


def image_metadata(made: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One image's metadata: its own prompts and seed, its number, and under "batch" those of the whole call.

    Sums of another batch size have another order, so an image is made again within its batch.
    """
    prompt_number = number // made["num_images_per_prompt"]
    own = {name: made[name][prompt_number] for name in TEXTS if isinstance(made.get(name), list)}
    if faults := faults_in(made, number):
        own["faults"] = faults
    batch = {name: made[name] for name in (*TEXTS, "seed", "num_images_per_prompt") if name in made}
    seed = made["seed"][number] if isinstance(made["seed"], list) else made["seed"]
    return {**made, **own, "seed": seed, "image": number, "batch": batch}


def faults_in(made: Mapping[str, Any], number: int) -> list[str]:
    """What a call's metadata say is wrong with one of its images (`Output.faults`)."""
    return [fault for fault in made.get("faults", ()) if fault.startswith((f"image {number}: ", f"video {number}: "))]


def parameters(made: Mapping[str, Any]) -> str:
    """One image's settings as AUTOMATIC1111's web UI writes them, and other tools read them."""
    lines, scheduler = [made.get("prompt") or ""], made.get("scheduler")
    if isinstance(scheduler, Mapping):
        scheduler = scheduler["_class_name"]
    if made.get("negative_prompt"):
        lines.append(f"Negative prompt: {made['negative_prompt']}")
    settings = {
        "Steps": made["num_inference_steps"],
        "Sampler": SAMPLERS.get(scheduler or EULER),
        "CFG scale": 1 if made["cfg_scale"] is None else made["cfg_scale"],
        "Distilled CFG Scale": made["embedded_guidance"],
        "Seed": made["seed"],
        "Denoising strength": made.get("strength"),
        "Size": f"{made['width']}x{made['height']}",
        "Model": model_name(Path(made["folder"])),
        "Version": f"dfa2_jax {made['versions']['dfa2_jax']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def options_again(made: Mapping[str, Any], plan: Plan | None) -> Options:
    """The options of the call that made an image, by the image's metadata.

    Raises:
        ValueError: the metadata lacks an argument: an array, or the caller's own code.
    """
    known = {argument.name for argument in fields(Options)} - {"plan", "image"}  # "image" is the image's number
    arguments = {name: value for name, value in {**made, **made.get("batch", {})}.items() if name in known}
    for name, value in arguments.items():
        if name in CODE or name.endswith(ARRAYS):
            raise ValueError(f"the image was made with {name}={value}, which its metadata does not hold.")
    pictures = {name: value for name, value in made.get("source", {}).items() if name != "digest"}
    for name, value in pictures.items():
        if not all(Path(path).is_file() for path in ([value] if isinstance(value, str) else value)):
            raise ValueError(f"the image was made with {name}={value}, which is no file that is there.")
    return of_names(Options, arguments | pictures | {"plan": plan})


def where(picture: Any) -> Any:
    """The path of a picture, or what it is."""
    if isinstance(picture, Image.Image):
        return f"a picture of {picture.height} x {picture.width} px"
    if isinstance(picture, str | PathLike):
        return str(Path(picture).absolute())
    if isinstance(picture, list | tuple):
        return [where(part) for part in picture]
    return f"array{list(np.shape(picture))}"


def plain(value: Any) -> Any:
    """As JSON knows it: no NumPy numbers, no tuples, no mappings but dicts."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
