"""`dfa2`: sample images, find plans and judge them from a shell, and say what this machine can do. `dfa2-convert`.

Flags are fields of `dfa2_jax.options`. A command is a module of `dfa2_jax.commands`, imported when it runs: what is
imported here imports no JAX, and help answers at once.
"""

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dfa2_jax import __version__
from dfa2_jax.commands.flags import ALIASES, add_flags
from dfa2_jax.io.arguments import Parser
from dfa2_jax.io.errors import printable
from dfa2_jax.io.signals import Interrupted, exiting, interruptible
from dfa2_jax.io.terminal import answered
from dfa2_jax.options import CALL, CalibrationOptions, Options, ReportOptions
from dfa2_jax.weights.dtypes import FLOAT_DTYPES, PRECISIONS, TEXT_ENCODER_DTYPES

DEMO = (
    "Sample with a small model that is installed with this package, dense and by its plan, and draw both side by "
    "side. Nothing is downloaded. Every run makes its images anew, and replaces those of an earlier run."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes.

    - 0: all is well.
    - 1: a plan misses a limit of `dfa2 report`, `dfa2 again` makes other pixels, or images of `dfa2 sample` cannot be
      right.
    - 2: bad input, or a process that others ran the command with was lost; with one line on stderr.
    - 70: a fault of ours in one of several processes, with its traceback; alone, Python's own 1.
    - 128 and its number: a signal ended the command (Ctrl-C: 130).
    - 141: the reader of stdout has left.
    """

    def run() -> int:
        args = _parser().parse_args(argv)
        return _run(f"dfa2 {args.command}", args)

    try:
        return _left(answered(run))
    except Exception:
        if _is_one_of_several():
            traceback.print_exc()
            _left(70)  # EX_SOFTWARE
        raise


def _is_one_of_several() -> bool:
    """Whether other processes run the same command."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _left(code: int) -> int:
    """The exit code; a process that failed beside others leaves at once. JAX would wait for them, and they for it."""
    if code > 1 and _is_one_of_several():
        if sys.modules["jax"].process_index() == 0:
            time.sleep(1)  # the others lose the first one's service, and should have said first what is wrong
        os._exit(code)
    return code


def convert(argv: Sequence[str] | None = None) -> int:
    """`dfa2-convert`. Exit codes: 0, or 2 with one line on stderr, or 128 and its number where a signal ended it."""
    parser = Parser(prog="dfa2-convert", description="Convert a diffusers folder to Orbax.")
    parser.set_defaults(run=("convert", "run"))
    parser.add_argument("src", metavar="SRC", help="a diffusers folder, or a hub id such as owner/name")
    parser.add_argument("dst", metavar="DST", help="the folder to write; must not exist")
    parser.add_argument("--dtype", choices=(*FLOAT_DTYPES, *PRECISIONS), help="of the weights (default: as stored)")
    _add_lora(parser)
    parser.add_argument("--download", action="store_true", help="fetch a hub id that your cache lacks")
    args = parser.parse_args(argv)
    return answered(lambda: _run(parser.prog, args))


def _run(name: str, args: argparse.Namespace) -> int:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    module, function = args.run
    try:
        with interruptible():
            with exiting(f"{name}: interrupted"):
                command = getattr(import_module(f"dfa2_jax.commands.{module}"), function)
            return command(args)
    except BrokenPipeError:
        raise
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"{name}: {printable(str(error))}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"{name}: not enough memory: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{name}: interrupted", file=sys.stderr)
        return error.exit_code if isinstance(error, Interrupted) else 130


def _parser() -> Parser:
    parser = Parser(prog="dfa2", description="SD3, SD3.5, FLUX.1 and CogVideoX in JAX.")
    parser.add_argument("--version", action="version", version=f"dfa2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    sample = commands.add_parser(
        "sample",
        help="text to images or videos",
        description="Sample images or videos. Interrupted, the same command goes on: it makes what is not there yet.",
        epilog="stdout holds the paths of images, or videos, one per line, and nothing else.",
    )
    _add_sample(sample)

    _add_again(
        commands.add_parser(
            "again",
            help="an image made anew",
            description="Make an image anew from what it says of itself, and compare the two.",
            epilog="Exit codes: 0 where all pixels are the same; 1 where not; 2 for bad input; 130 when interrupted.",
        )
    )

    calibrate = commands.add_parser("calibrate", help="prompts to a plan", description="Find a plan for dfa2 sample.")
    calibrate.set_defaults(run=("calibrate", "run"))
    _add_folder(calibrate)
    _add_prompts(calibrate)
    calibrate.add_argument("--out", type=Path, required=True, metavar="PLAN.json")
    add_flags(calibrate, CalibrationOptions)
    add_flags(calibrate, Options, CALL)
    _add_dtype(calibrate)

    report = commands.add_parser(
        "report",
        help="what plans do to images or videos",
        description="Compare plans with dense sampling, next to the noise of rounding and to another seed.",
        epilog="The first line is the verdict. Exit codes: 0; 1 if a plan misses a limit; 2 for bad input; "
        "130 when interrupted.",
    )
    _add_report(report)

    _add_plan(commands.add_parser("plan", help="look at a plan, sign an edited one, or take another budget"))

    compare = "Compare a folder's files with their checksums."
    verify = commands.add_parser("verify", help="a folder against its checksums", description=compare)
    verify.set_defaults(run=("verify", "run"))
    _add_folder(verify, words="one that dfa2-convert wrote, or a hub id in your cache")

    _add_demo(commands.add_parser("demo", help="the model in the box, dense and by a plan", description=DEMO))
    doctor = commands.add_parser("doctor", help="what this machine can do", description="Report on this machine.")
    doctor.set_defaults(run=("doctor", "run"))
    return parser


def _add_sample(sample: argparse.ArgumentParser) -> None:
    sample.set_defaults(run=("sample", "run"))
    _add_folder(sample)
    _add_prompts(sample, required=False)
    sample.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    sample.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder; for one image also a .png, .webp or .jpg, for one video a .webp, .avif, .gif, .png or .mp4",
    )
    formats = ("png", "webp", "jpeg", "avif", "gif", "mp4")
    sample.add_argument("--format", choices=formats, help="of files in a folder (default: png; of videos webp)")
    sample.add_argument(
        "--preview", action="store_true", help="also a still sheet of at most 12 frames of each video, NAME.preview.png"
    )
    add_flags(sample, Options)
    _add_dtype(sample)


def _add_again(again: argparse.ArgumentParser) -> None:
    again.set_defaults(run=("again", "run"))
    again.add_argument("image", type=Path, help="a PNG, WebP, JPEG or AVIF that dfa2 or Output.save wrote")
    _add_folder(again, nargs="?", words="of the model (default: the one that the image names)")
    again.add_argument("--plan", type=Path, metavar="FILE", help="default: the one that the image names")
    again.add_argument("--out", type=Path, metavar="PATH", help="a new file, or a folder (default: the image's)")
    _add_verify(again)


def _add_report(report: argparse.ArgumentParser) -> None:
    report.set_defaults(run=("report", "run"))
    _add_folder(report)
    _add_prompts(report)
    report.add_argument(
        "--plan", type=Path, action="append", required=True, metavar="PLAN.json", help="may be repeated"
    )
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="for report.html and report.json")
    report.add_argument("--max-lpips", type=float, metavar="X", help="a limit of a plan's mean")
    report.add_argument("--min-ssim", type=float, metavar="X")
    report.add_argument("--min-psnr", type=float, metavar="X", help="in dB")
    _add_verify(report)
    add_flags(report, ReportOptions)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plans = plan.add_subparsers(dest="action", required=True)
    show = plans.add_parser("show", help="a summary, and a picture", description="Summarise a plan, and draw it.")
    show.set_defaults(run=("plans", "show"))
    show.add_argument("plan", type=Path)
    show.add_argument("--png", type=Path, metavar="FILE", help="where to draw it; default: beside the plan")
    sign = plans.add_parser("sign", help="accept edits", description="Check an edited plan and renew its digest.")
    sign.set_defaults(run=("plans", "sign"))
    sign.add_argument("plan", type=Path)
    other = "Find another step plan by what a calibration measured. It needs no model."
    resolve = plans.add_parser("resolve", help="another budget", description=other)
    resolve.set_defaults(run=("plans", "resolve"))
    resolve.add_argument("plan", type=Path)
    add_flags(resolve, CalibrationOptions, ("speedup", "psnr"))
    resolve.add_argument("--out", type=Path, required=True, metavar="PLAN.json")


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.set_defaults(run=("demo", "run"))
    demo.epilog = (
        "stdout holds the paths of images, or videos, one per line, as they are made; the last one is the picture's."
    )
    demo.add_argument("--video", action="store_true", help="videos of moving shapes, by a small CogVideoX")
    demo.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated (default: four that it never saw)"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("dfa2-demo"), metavar="DIR", help="a folder (default: %(default)s)"
    )


def _add_folder(
    parser: argparse.ArgumentParser,
    nargs: str | None = None,
    words: str = "a diffusers folder, one that dfa2-convert wrote, or the hub id of one in your cache",
) -> None:
    parser.add_argument("folder", nargs=nargs, help=words)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_prompts(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--prompts", type=Path, required=required, metavar="FILE", help="one prompt per line")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="load converted weights without their checksums"
    )


def devices(text: str) -> int | str:
    """The argument of --devices; its name is in argparse's message."""
    return text if text == "all" else int(text)


def _add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices",
        type=devices,
        metavar="N",
        help='GPUs that share the work: their number, or "all"; default: one',
    )
    parser.add_argument("--shard-weights", action="store_true", help="GPUs share the weights, too")


def lora(text: str) -> tuple[Path, float]:
    """The argument of --lora: a file and its scale."""
    file, colon, scale = text.rpartition(":")
    try:
        return (Path(file), float(scale)) if colon else (Path(text), 1.0)
    except ValueError:  # the colon is the name's
        return Path(text), 1.0


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA upon the weights (default scale: 1); may be repeated",
    )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    _add_verify(parser)
    _add_lora(parser)
    _add_devices(parser)
    parser.add_argument(
        "--dtype",
        *ALIASES["dtype"],
        choices=(*FLOAT_DTYPES, *PRECISIONS),
        help="default: the checkpoint's; float32 on CPU",
    )
    parser.add_argument(
        "--text-encoder-dtype",
        choices=TEXT_ENCODER_DTYPES,
        help="another one for text encoders; int8_weights halves T5",
    )


if __name__ == "__main__":
    sys.exit(main())
