"""`dfa2 sample`: text to images, in batches of one size."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dfa2_jax.commands.flags import given
from dfa2_jax.commands.previews import frames_in, preview_path, write_preview
from dfa2_jax.commands.start import open_pipeline, read_prompts, start, together
from dfa2_jax.demo.box import warn_unseen
from dfa2_jax.io.atomic import writable
from dfa2_jax.io.errors import printable
from dfa2_jax.io.images import exif, numbered, read_metadata, stem_of
from dfa2_jax.io.terminal import print_path
from dfa2_jax.io.videos import SILENT, check_video
from dfa2_jax.options import Options
from dfa2_jax.parallel.processes import is_first, said_by_first
from dfa2_jax.pipeline.output import EITHER, IMAGES, VIDEOS, Formats, image_metadata, metadata, parameters, videos
from dfa2_jax.pipeline.pipeline import Pipeline
from dfa2_jax.pipeline.request import MAX_IMAGES
from dfa2_jax.pipeline.timing import told
from dfa2_jax.plan.plan import Plan

KNOWN_LATER = ("density", "faults")
"""Fields of an image's metadata that only its call knows."""


@dataclass(frozen=True)
class Shot:
    """What one image is made from. texts: the prompts of each encoder, by argument."""

    texts: dict[str, str]
    seed: int


@dataclass(frozen=True)
class Batch:
    """One call. images: what each image to be kept will say of itself; those that only fill up are not among them."""

    options: Options
    images: list[dict[str, Any]]


@together
def run(args: argparse.Namespace) -> int:
    start(args)
    shots = shots_of(args)
    target = Target.of(args, EITHER, len(shots))
    plan = None if args.plan is None else Plan.load(args.plan)
    phase = nullcontext if args.quiet else told
    with phase("loading"):
        pipeline = open_pipeline(args)
    target = Target.of(args, IMAGES if pipeline.sizes.num_frames is None else VIDEOS, len(shots))
    if args.preview and target.formats is IMAGES:
        raise ValueError("--preview draws frames of videos: this model makes images, so leave it out.")
    options: dict[str, Any] = given(args, Options) | {"plan": plan, "progress": not args.quiet}
    options["num_images_per_prompt"] = 1  # a shot is one image
    negative = (args.negative_prompt, args.negative_prompt_2, args.negative_prompt_3)
    warn_unseen(pipeline.fingerprint, [*(text for shot in shots for text in shot.texts.values()), *negative])
    plan_file = {} if args.plan is None else {"plan_file": str(args.plan.absolute())}
    batches = list(batches_of(pipeline, options, shots, args.batch, plan_file))  # all are checked before one is made
    target.check(image for batch in batches for image in batch.images)
    seconds: Counter[str] = Counter()
    is_sound = True
    for batch in batches:
        paths = [target.find(image) if is_first() else None for image in batch.images]
        output = None
        if said_by_first(bytes([None in paths])) == b"\1":  # others need not see the folder
            output = pipeline.sample(batch.options, phase)
            output = replace(output, metadata=output.metadata | plan_file)
            seconds.update(output.timings | {"calls": 1})
            is_sound &= not output.faults
            phase = nullcontext  # later batches have the shapes of this one: they compile nothing
        for number, path in enumerate(paths if is_first() else ()):
            if path is None:
                assert output is not None
                (path,) = output.save(target.out, format=target.kind, numbers=[number], overwrite=False)
                target.taken.add(path)
                if args.preview:
                    write_preview(path, videos(output.frames)[number])
            else:
                print(f"skipped {path}: it is made already", file=sys.stderr)
                for fault in read_metadata(path).get("faults", ()):
                    print(printable(f"{path}: {fault}"), file=sys.stderr)
                    is_sound = False
                if args.preview and not preview_path(path).exists():
                    write_preview(path, frames_in(path, read_metadata(path)["fps"]))
            print_path(path)
    if seconds and not args.quiet:
        calls = seconds.pop("calls")
        totals = {"load": pipeline.load_seconds} | seconds | {"per_step": seconds["per_step"] / calls}
        print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in totals.items()), file=sys.stderr)
    return 0 if is_sound else 1


def shots_of(args: argparse.Namespace) -> list[Shot]:
    """Each prompt with each seed.

    Raises:
        ValueError: there is no prompt, or counts disagree.
    """
    prompts = [*(args.prompt or []), *(read_prompts(args.prompts) if args.prompts else [])]
    if not prompts:
        raise ValueError("there is no prompt: pass --prompt TEXT or --prompts FILE.")
    texts = {"prompt": prompts}
    for name in ("prompt_2", "prompt_3"):
        values = getattr(args, name)
        if values is not None:
            if len(values) not in (1, len(prompts)):
                raise ValueError(f"{len(values)} of {name} for {len(prompts)} prompts: pass one, or one for each.")
            texts[name] = values * (len(prompts) // len(values))
    seeds: Sequence[int] = args.seed if isinstance(args.seed, list) else [args.seed]
    count = args.num_images_per_prompt
    if count != 1:
        if len(seeds) > 1 or not 1 <= count <= MAX_IMAGES:
            raise ValueError(
                f"--num-images-per-prompt {count} must be 1 to {MAX_IMAGES}, and goes with one seed: {seeds!s:.100}."
            )
        seeds = range(seeds[0], seeds[0] + count)
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch} must be at least 1.")
    each = [{name: values[i] for name, values in texts.items()} for i in range(len(prompts))]
    return [Shot(own, seed) for own in each for seed in seeds]


def batches_of(
    pipeline: Pipeline, options: dict[str, Any], shots: Sequence[Shot], size: int, plan_file: dict[str, str]
) -> Iterator[Batch]:
    """Calls of one size, since another size would compile anew: the last shot fills up the last batch.

    Raises:
        ValueError: what is wrong with the options.
    """
    size = min(size, len(shots))
    for i in range(0, len(shots), size):
        kept = shots[i : i + size]
        filled = [*kept, *[kept[-1]] * (size - len(kept))]
        own: dict[str, Any] = {name: [shot.texts[name] for shot in filled] for name in kept[0].texts}
        own["seed"] = [shot.seed for shot in filled]
        asked = Options(**options | own)
        made = metadata(pipeline, pipeline.guided(asked), pipeline.request(asked)) | plan_file
        yield Batch(asked, [image_metadata(made, number) for number in range(len(kept))])


@dataclass(frozen=True)
class Target:
    """Where images go. taken: files that this run has made or found."""

    out: Path
    formats: Formats
    kind: str
    taken: set[Path] = field(default_factory=set)

    @classmethod
    def of(cls, args: argparse.Namespace, formats: Formats, count: int) -> "Target":
        return cls(args.out, formats, formats.of(args.out, args.format, count))

    def __post_init__(self) -> None:
        """Raises OSError where nothing can be written, by the process that writes."""
        if is_first():
            writable(self.out.parent if self.formats.names_file(self.out) else self.out)

    def check(self, images: Iterator[dict[str, Any]]) -> None:
        """Says where no file can be found again.

        Raises:
            ValueError: JPEG has no room for what an image says of itself, or a format does not take a video.
            MissingExtra: MP4 without the extra `video`.
        """
        for made in images:
            if self.kind == "jpeg":
                exif(self.kind, made, parameters(made))
            if self.formats is VIDEOS:
                check_video(self.kind, made["fps"], (made["height"], made["width"]))
        if self.is_silent and not self.formats.names_file(self.out):
            print(f"{self.kind} does not say how it was made: videos that are there are made again", file=sys.stderr)

    @property
    def is_silent(self) -> bool:
        """Whether files do not say how they were made."""
        return self.formats is VIDEOS and self.kind in SILENT

    def find(self, made: dict[str, Any]) -> Path | None:
        """The file of an image that an earlier run has made as this one would.

        Raises:
            FileExistsError: the one file that was asked for is another image.
        """
        is_file, suffixes = self.formats.names_file(self.out), self.formats.suffixes_of(self.kind)
        files = [self.out] if is_file else numbered(self.out, stem_of(made["prompt"], made["seed"]), suffixes)
        for path in files:
            if path not in self.taken and path.exists() and _says(path, made):
                self.taken.add(path)
                return path
        if is_file and self.out.exists():
            why = f"{self.kind} does not say how it was made" if self.is_silent else "made otherwise"
            raise FileExistsError(f"--out {self.out} is there, and {why}: remove it, or choose another name.")
        return None


def _says(path: Path, made: dict[str, Any]) -> bool:
    """Whether a file is complete, and says what its image would say of itself."""
    try:
        said = read_metadata(path)
    except ValueError:
        return False
    return {name: value for name, value in said.items() if name not in KNOWN_LATER} == json.loads(json.dumps(made))
