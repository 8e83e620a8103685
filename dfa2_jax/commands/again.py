"""`dfa2 again`: an image or a video made anew from what it says of itself, and compared with it."""

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageSequence

from dfa2_jax import __version__
from dfa2_jax.commands.sample import Target
from dfa2_jax.commands.start import start
from dfa2_jax.io.errors import blame, printable
from dfa2_jax.io.images import read_metadata
from dfa2_jax.io.terminal import print_path
from dfa2_jax.io.videos import check_video
from dfa2_jax.pipeline.output import IMAGES, VIDEOS, Formats, faults_in, options_again
from dfa2_jax.pipeline.pipeline import Pipeline
from dfa2_jax.pipeline.timing import told
from dfa2_jax.plan.plan import Plan


def run(args: argparse.Namespace) -> int:
    made = read_metadata(args.image)
    folder = args.folder or made.get("folder")
    if not isinstance(folder, str):
        raise ValueError(f"{args.image} names no folder of its model: dfa2 again {args.image} FOLDER.")
    formats = VIDEOS if made.get("num_frames") else IMAGES
    target = target_of(args, formats)
    with blame(f"{args.image} cannot be made again"):  # a stranger's file may say anything
        plan = plan_of(args, made)
        options = options_again(made, plan)
    start()
    for name, then, now in changes(made):
        print(printable(f"{name} was {then}, and is {now}: pixels may differ"), file=sys.stderr)
    phase = nullcontext if args.quiet else told
    with phase("loading"):
        pipeline = Pipeline.from_pretrained(
            folder,
            dtype=made.get("requested_dtype"),
            text_encoder_dtype=made.get("text_encoder_dtype"),
            torch_rounding=made.get("torch_rounding", False),
            verify=args.verify,
        )
    add_loras(pipeline, args.image, made.get("loras", []))
    if pipeline.fingerprint != made.get("fingerprint"):
        raise ValueError(
            f"{args.image} was made with weights {made.get('fingerprint')}, and {folder} holds {pipeline.fingerprint}: "
            f"dfa2 again {args.image} FOLDER, with the folder of those weights."
        )
    if pipeline.folder_digest != made.get("folder_digest"):
        note = f"{folder} is not as it was when the image was made: VAE, text encoders or scheduler may be others"
        print(printable(note), file=sys.stderr)
    with blame(f"{args.image} cannot be made again"):
        request = pipeline.request(options)
        if not 0 <= made["image"] < request.batch:
            raise ValueError(f"it says that it is image {made['image']} of {request.batch}.")
        if request.source is not None and request.source.digest != made["source"].get("digest"):
            raise ValueError(f"its source is not as it was: {made['source']}.")
    if formats is VIDEOS:
        check_video(target.kind, request.fps or 0, (request.height, request.width))
    output = pipeline.sample(replace(options, progress=not args.quiet), phase)
    if plan is not None:
        output.metadata["plan_file"] = str(plan_path(args, made).absolute())
    kind = None if formats.names_file(target.out) else target.kind
    (path,) = output.save(target.out, format=kind, numbers=[made["image"]], overwrite=False)
    print_path(path)
    differs = compare(args.image, path)
    return 1 if faults_in(output.metadata, made["image"]) else differs


def target_of(args: argparse.Namespace, formats: Formats) -> Target:
    """Where the image or video goes that is made.

    Raises:
        FileExistsError: a file is there. It might be the image itself, which would then be compared with itself.
    """
    out = args.out or args.image.parent
    if not formats.names_file(out):
        return Target(out, formats, formats.suffixes.get(args.image.suffix.lower(), formats.default))
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"--out {out} is there: choose another name, or a folder.")
    return Target(out, formats, formats.of(out, None, 1))


def plan_path(args: argparse.Namespace, made: dict[str, Any]) -> Path:
    """The path of the image's plan.

    Raises:
        ValueError: neither the command nor the image names it.
    """
    path = args.plan or made.get("plan_file")
    if path is None:
        raise ValueError(f"{args.image} was made by plan {made['plan']}, and does not name its file: pass --plan FILE.")
    return Path(path)


def plan_of(args: argparse.Namespace, made: dict[str, Any]) -> Plan | None:
    """The plan that an image was made by.

    Raises:
        ValueError: another plan lies where the image's plan lay, or none.
    """
    if made.get("plan") is None:
        return None
    path = plan_path(args, made)
    if not path.exists():
        raise ValueError(f"{args.image} was made by the plan {path}, which is not there: pass --plan FILE.")
    plan = Plan.load(path)
    if plan.digest != made["plan"]:
        raise ValueError(
            f"{args.image} was made by plan {made['plan']}, and {path} is {plan.digest}: pass that one by --plan FILE."
        )
    return plan


def add_loras(pipeline: Pipeline, image: Path, loras: Any) -> None:
    """Loads the LoRAs that an image was made with.

    Raises:
        ValueError: a file is not there, or is another one, or the image does not say which.
    """
    with blame(f"{image} cannot be made again"):
        files = [(Path(lora["file"]), float(lora["scale"]), str(lora["name"]), lora["sha256"]) for lora in loras]
    for file, scale, name, sha256 in files:
        if not file.is_file():
            raise ValueError(
                f"{image} was made with the LoRA {file}, sha256 {sha256}, which is not there: put it back."
            )
        pipeline.load_lora(file, scale, name)
        if (own := pipeline.loras[name]["sha256"]) != sha256:
            raise ValueError(f"{image} was made with the LoRA {file} of sha256 {sha256}, and that file now has {own}.")


def changes(made: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What is not as it was when the image was made: name, value then, value now."""
    device = jax.devices()[0]
    now = {
        "versions": {"dfa2_jax": __version__, "jax": jax.__version__},
        "device": f"{device.platform} {device.device_kind}",
    }
    return [(name, made.get(name), value) for name, value in now.items() if made.get(name) != value]


def compare(first: Path, second: Path) -> int:
    """Says on stderr by how much two images, or all frames of two videos, differ; 0 where they do not."""
    with Image.open(first) as one, Image.open(second) as other:
        shapes = [(getattr(image, "n_frames", 1), *image.size) for image in (one, other)]
        if shapes[0] != shapes[1]:
            words = "{} frames of {} x {}".format
            print(f"{second} has {words(*shapes[1])}, and {first} has {words(*shapes[0])}", file=sys.stderr)
            return 1
        count = size = most = 0
        for frames in zip(ImageSequence.Iterator(one), ImageSequence.Iterator(other), strict=True):
            pixels = [np.asarray(frame.convert("RGB"), np.int16) for frame in frames]
            difference = np.abs(pixels[0] - pixels[1])
            count, size = count + np.count_nonzero(difference), size + difference.size
            most = max(most, difference.max())
    if not count:
        print(f"{second} has the pixels of {first}, bit for bit", file=sys.stderr)
        return 0
    print(f"{second} differs from {first} in {count} of {size} values, by at most {most} of 255", file=sys.stderr)
    return 1
