"""`dfa2`: sample images, find plans and judge them from a shell, and say what this machine can do.

Flags are fields of `dfa2_jax.options`. What imports JAX is imported by the command that needs it: help answers at once.
"""

import argparse
import json
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

from dfa2_jax import __version__
from dfa2_jax.io.atomic import replacing
from dfa2_jax.io.extras import MissingExtra
from dfa2_jax.options import CALL, CalibrationOptions, Options, ReportOptions
from dfa2_jax.weights.dtypes import FLOAT_DTYPES


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 where `dfa2 report` has limits and a plan misses one; 2 for bad input (one line on stderr); 130
    when interrupted."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        return args.run(args)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"dfa2 {args.command}: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"dfa2 {args.command}: not enough memory: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dfa2 {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dfa2", description="SD3, SD3.5 and FLUX.1 in JAX.")
    parser.add_argument("--version", action="version", version=f"dfa2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    sample = commands.add_parser("sample", help="text to images", description="Sample images into a folder.")
    sample.set_defaults(run=run_sample)
    _add_folder(sample)
    sample.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the PNG files go")
    add_flags(sample, Options)
    _add_dtype(sample)

    calibrate = commands.add_parser("calibrate", help="prompts to a plan", description="Find a plan for dfa2 sample.")
    calibrate.set_defaults(run=run_calibrate)
    _add_folder(calibrate)
    _add_prompts(calibrate)
    calibrate.add_argument("--out", type=Path, required=True, metavar="PLAN.json")
    add_flags(calibrate, CalibrationOptions)
    add_flags(calibrate, Options, CALL)
    _add_dtype(calibrate)

    report = commands.add_parser(
        "report",
        help="what plans do to images",
        description="Compare plans with dense sampling, next to the noise of rounding and to another seed.",
        epilog="Exit codes: 0; 1 if a plan misses a limit; 2 for bad input; 130 when interrupted.",
    )
    report.set_defaults(run=run_report)
    _add_folder(report)
    _add_prompts(report)
    report.add_argument(
        "--plan", type=Path, action="append", required=True, metavar="PLAN.json", help="may be repeated"
    )
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="for report.html and report.json")
    report.add_argument("--max-lpips", type=float, metavar="X", help="a limit of a plan's mean")
    report.add_argument("--min-ssim", type=float, metavar="X")
    report.add_argument("--min-psnr", type=float, metavar="X", help="in dB")
    add_flags(report, ReportOptions)

    plans = commands.add_parser("plan", help="look at a plan, or sign an edited one").add_subparsers(
        dest="action", required=True
    )
    show = plans.add_parser("show", help="a summary, and a picture", description="Summarise a plan, and draw it.")
    show.set_defaults(run=run_plan_show)
    show.add_argument("plan", type=Path)
    show.add_argument("--png", type=Path, metavar="FILE", help="where to draw it; default: beside the plan")
    sign = plans.add_parser("sign", help="accept edits", description="Check an edited plan and renew its digest.")
    sign.set_defaults(run=run_plan_sign)
    sign.add_argument("plan", type=Path)

    doctor = commands.add_parser("doctor", help="what this machine can do", description="Report on this machine.")
    doctor.set_defaults(run=run_doctor)
    return parser


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a diffusers folder, or one that dfa2-convert wrote")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one prompt per line")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, help="default: the checkpoint's; float32 on CPU")


def flagged(group: Any, names: Sequence[str] | None = None) -> Iterator[Field[Any]]:
    """The fields of an options class that have a flag; of all, or of those named."""
    for argument in fields(group):
        if argument.metadata["flag"] and (names is None or argument.name in names):
            yield argument


def add_flags(parser: argparse.ArgumentParser, group: Any, names: Sequence[str] | None = None) -> None:
    """A flag for each field that has one. What its metadata leaves open follows from name, type and default."""
    for argument in flagged(group, names):
        flag, default, words = argument.metadata["flag"], argument.default, argument.metadata["words"]
        kind = next((kind for kind in (bool, int, float) if kind in _kinds(argument.type)), str)
        text = argument.metadata["description"].replace("None:", "default:").replace("`", "")
        follows: dict[str, Any] = {"dest": argument.name, "default": default, "help": text}
        if kind is bool:
            follows["action"] = "store_false" if default else "store_true"
        else:
            follows |= {"type": kind} | ({} if "choices" in words else {"metavar": METAVARS[kind]})
        words = follows | words
        if default is not None and kind is not bool:
            words["help"] += f" (default: {default})"
        parser.add_argument(f"--{argument.name.replace('_', '-')}" if flag is True else flag, **words)


METAVARS = {int: "N", float: "X", str: "TEXT"}


def _kinds(annotation: Any) -> Iterator[Any]:
    """A type, and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def given(args: argparse.Namespace, group: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The options of a group as their types have them: a list of one is that one, where the type is not only a list."""
    options = {}
    for argument in flagged(group, names):
        value, kinds = getattr(args, argument.name), {*_kinds(argument.type)}
        if isinstance(value, list):
            if any(get_origin(kind) is tuple for kind in kinds):
                value = tuple(value)
            elif len(value) == 1 and type(value[0]) in get_args(argument.type):
                value = value[0]
        options[argument.name] = value
    return options


def devices() -> list[Any]:
    """JAX's.

    Raises:
        OSError: JAX cannot start, with its reason.
    """
    import jax

    try:
        return jax.devices()
    except Exception as error:  # a RuntimeError, or an AssertionError where JAX_PLATFORMS names what is not installed
        asked = os.environ.get("JAX_PLATFORMS") or "not set"
        raise OSError(f"JAX finds no device to run on (JAX_PLATFORMS is {asked}): {error!r:.300}") from error


def run_sample(args: argparse.Namespace) -> int:
    enable_compilation_cache()
    devices()
    from dfa2_jax import Pipeline, Plan

    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        raise PermissionError(f"--out {args.out} is not writable: choose another folder.")
    plan = None if args.plan is None else Plan.load(args.plan)
    pipeline = Pipeline.from_pretrained(args.folder, dtype=args.dtype)
    options: dict[str, Any] = given(args, Options) | {"plan": plan, "progress": not args.quiet}
    output = pipeline(**options)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images_per_prompt)]
    for index, (image, prompt) in enumerate(zip(output.images, prompts, strict=True)):
        print(save_image(image, args.out, prompt, output.metadata | {"image": index}))
    seconds = {"load": pipeline.load_seconds} | output.timings
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    return 0


def run_calibrate(args: argparse.Namespace) -> int:
    """Progress is kept beside the plan: the same command goes on after an interruption."""
    enable_compilation_cache()
    devices()
    from dfa2_jax.calibration.calibrate import calibrate
    from dfa2_jax.pipeline.pipeline import Pipeline

    prompts = read_prompts(args.prompts)
    if not os.access(args.out.absolute().parent, os.W_OK):
        raise PermissionError(f"--out {args.out} is not in a folder that is there and writable: choose another one.")
    resume = args.out.with_name(f"{args.out.name}.progress")
    pipeline = Pipeline.from_pretrained(args.folder, dtype=args.dtype)
    options: dict[str, Any] = given(args, Options, CALL) | given(args, CalibrationOptions) | {"c": args.c or None}
    plan = calibrate(pipeline, prompts, **options, progress=not args.quiet, resume=resume)
    plan.save(args.out)
    resume.unlink(missing_ok=True)
    print(args.out)
    return 0


def read_prompts(path: Path) -> list[str]:
    """One per line; empty lines are skipped.

    Raises:
        ValueError: there is none, or the file is no UTF-8.
    """
    try:
        prompts = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is not UTF-8: {error}") from error
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt: write one per line.")
    return prompts


def run_report(args: argparse.Namespace) -> int:
    enable_compilation_cache()
    devices()
    from dfa2_jax.plan.plan import Plan
    from dfa2_jax.report.report import quality_report
    from dfa2_jax.report.table import writable

    prompts, names = read_prompts(args.prompts), [path.stem for path in args.plan]
    if len({*names}) < len(names):  # plans of one name in different folders
        names = [str(path) for path in args.plan]
    plans = {name: Plan.load(path) for name, path in zip(names, args.plan, strict=True)}
    if len(plans) < len(names):
        raise ValueError(f"--plan {max(names, key=names.count)} is there twice.")
    writable(args.out)
    limits = {"lpips": args.max_lpips, "ssim": args.min_ssim, "psnr": args.min_psnr}
    limits = {metric: limit for metric, limit in limits.items() if limit is not None}
    options = given(args, ReportOptions)
    report = quality_report(args.folder, plans, prompts, **options, limits=limits, progress=not args.quiet)
    print(report.save(args.out))
    for failure in report.failures:
        print(f"dfa2 report: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


def run_plan_show(args: argparse.Namespace) -> int:
    from dfa2_jax.plan.plan import Plan
    from dfa2_jax.plan.view import draw, summary

    plan = Plan.load(args.plan)
    print(summary(plan))
    picture = args.png or args.plan.with_suffix(".png")
    try:
        draw(plan, picture)
        print(picture)
    except MissingExtra as error:
        if args.png:
            raise
        print(f"dfa2 plan show: {error}", file=sys.stderr)
    return 0


def run_plan_sign(args: argparse.Namespace) -> int:
    from dfa2_jax.plan.plan import Plan

    print(Plan.sign(args.plan).digest)
    return 0


def save_image(image: Any, folder: Path, prompt: str, metadata: dict[str, Any]) -> Path:
    """Write a PNG named after its prompt, never over another nor in part; its text chunk "dfa2_jax" says how to make it
    again."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("dfa2_jax", json.dumps(metadata, ensure_ascii=False))
    stem = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "image"
    number = 0
    while True:
        path = folder / f"{stem}-{number}.png"
        try:
            path.touch(exist_ok=False)  # the name is ours
            break
        except FileExistsError:
            number += 1
    try:
        with replacing(path) as file:
            image.save(file, format="PNG", pnginfo=info)
    except BaseException:
        path.unlink()
        raise
    return path


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second run of a shape starts at once. The library never does this."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "dfa2_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def run_doctor(args: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError, version

    from dfa2_jax.nn.attention import arrow_implementation, dense_implementation

    _tell("python", platform.python_version())
    for name in ("dfa2-jax", "jax", "jaxlib", "flax", "orbax-checkpoint"):
        try:
            _tell(name, version(name))
        except PackageNotFoundError:
            _tell(name, "not installed")
    device = devices()[0]
    _tell("device", f"{len(devices())} x {device.device_kind} ({device.platform})")
    _tell("driver", _driver())
    for dtype, head_dim, model in (("bfloat16", 64, "SD3"), ("bfloat16", 128, "FLUX.1"), ("float32", 128, "float32")):
        for kind, choose in (("dense", dense_implementation), ("arrow", arrow_implementation)):
            choice = choose(dtype, head_dim)
            _tell(f"{kind} {model}", f"{choice.implementation}: {choice.why}")
    if advice := missing_kernels(device):
        _tell("missing", advice)
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        _tell("device memory", f"{free / 1e9:.1f} GB free of {stats['bytes_limit'] / 1e9:.1f} GB that JAX may use")
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _tell("host memory", f"{pages / 1e9:.1f} GB free")
    _tell("disk", f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here")
    return 0


def _tell(name: str, fact: str) -> None:
    print(f"{name:17s} {fact}")


def missing_kernels(device: Any) -> str | None:
    """What a Hopper GPU lacks under a jax older than 0.11, why, and what to do; None where nothing is missing."""
    import jax

    if int(float(getattr(device, "compute_capability", 0))) != 9 or jax.__version_info__ >= (0, 11):
        return None
    if sys.version_info >= (3, 12):
        why, advice = f"they need jax 0.11, this is {jax.__version__}", "pip install 'dfa2-jax[cuda13]' 'jax>=0.11'"
    else:
        why = f"they need jax 0.11, which needs Python 3.12; pip on Python 3.11 resolves jax {jax.__version__}"
        advice = "make an environment of Python 3.12, and there pip install 'dfa2-jax[cuda13]' 'jax>=0.11'"
    return f"the Mosaic kernels, the fastest ones on this GPU: {why}. To have them, {advice}"


def _driver() -> str:
    """NVIDIA's driver version, from the kernel module: nvidia-smi is not in every container."""
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return "no NVIDIA driver"
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text())
    return version.group() if version else "unknown"


if __name__ == "__main__":
    sys.exit(main())
