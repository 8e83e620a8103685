"""`dfa2`: sample images, find plans and judge them from a shell, and say what this machine can do."""

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dfa2_jax.io.atomic import replacing

DTYPES = ("float32", "bfloat16", "float16")


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
    commands = parser.add_subparsers(dest="command", required=True)

    sample = commands.add_parser("sample", help="text to images", description="Sample images into a folder.")
    sample.set_defaults(run=run_sample)
    sample.add_argument("folder", help="a diffusers folder, or one that dfa2-convert wrote")
    sample.add_argument("--prompt", action="append", required=True, help="repeat it for a batch")
    sample.add_argument("--negative-prompt", help="for all prompts")
    sample.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the PNG files go")
    sample.add_argument("--height", type=int, metavar="PX")
    sample.add_argument("--width", type=int, metavar="PX")
    sample.add_argument("--steps", type=int, dest="num_inference_steps")
    sample.add_argument("--guidance-scale", type=float)
    sample.add_argument("--true-cfg-scale", type=float, default=1.0, help="FLUX with a negative prompt")
    sample.add_argument("--skip-guidance-layers", type=int, nargs="+", metavar="LAYER", help="SD3.5-medium: 7 8 9")
    sample.add_argument("--num-images-per-prompt", type=int, default=1)
    sample.add_argument("--max-sequence-length", type=int, metavar="TOKENS", help="of T5")
    sample.add_argument("--seed", type=int, nargs="+", default=[0], help="one for the batch, or one per image")
    sample.add_argument("--plan", type=Path, metavar="FILE", help="from dfa2 calibrate; it says size and steps too")
    sample.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's; float32 on CPU")
    sample.add_argument("--quiet", action="store_true", help="no progress bar")

    calibrate = commands.add_parser("calibrate", help="prompts to a plan", description="Find a plan for dfa2 sample.")
    calibrate.set_defaults(run=run_calibrate)
    calibrate.add_argument("folder", help="a diffusers folder, or one that dfa2-convert wrote")
    calibrate.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one prompt per line")
    calibrate.add_argument("--out", type=Path, required=True, metavar="PLAN.json")
    calibrate.add_argument("--delta", type=float, default=0.4, help="error budget of a layer at a step: larger, faster")
    calibrate.add_argument("--c", type=float, default=1.5, help="a head's share of it; 0: no limit")
    calibrate.add_argument("--windows", type=int, nargs="*", default=[8, 16, 32], metavar="F", help="arrows of 1/F")
    calibrate.add_argument("--no-cache", dest="cache", action="store_false", help="arrows only")
    calibrate.add_argument("--negative-prompt", help="for all prompts")
    calibrate.add_argument("--height", type=int, metavar="PX")
    calibrate.add_argument("--width", type=int, metavar="PX")
    calibrate.add_argument("--steps", type=int, dest="num_inference_steps")
    calibrate.add_argument("--guidance-scale", type=float)
    calibrate.add_argument("--max-sequence-length", type=int, metavar="TOKENS", help="of T5")
    calibrate.add_argument("--seed", type=int, default=0)
    calibrate.add_argument("--attention-chunk", type=int, metavar="IMAGES", help="to save memory, as many at once")
    calibrate.add_argument("--tiles", type=int, nargs=2, metavar=("QUERIES", "KEYS"), help="whose savings count")
    calibrate.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's; float32 on CPU")
    calibrate.add_argument("--quiet", action="store_true", help="no progress bar")

    _report_arguments(commands)

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


def _report_arguments(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="what plans do to images",
        description="Compare plans with dense sampling, next to the noise of rounding and to another seed.",
        epilog="Exit codes: 0; 1 if a plan misses a limit; 2 for bad input; 130 when interrupted.",
    )
    report.set_defaults(run=run_report)
    report.add_argument("folder", help="a diffusers folder, or one that dfa2-convert wrote")
    report.add_argument(
        "--plan", type=Path, action="append", required=True, metavar="PLAN.json", help="may be repeated"
    )
    report.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one prompt per line")
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="for report.html and report.json")
    report.add_argument("--seed", type=int, nargs="+", default=[0], help="every prompt is sampled from each")
    report.add_argument("--negative-prompt", help="for all prompts")
    report.add_argument("--guidance-scale", type=float, help="default: the first plan's")
    report.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time")
    report.add_argument("--max-lpips", type=float, metavar="X", help="a limit of a plan's mean")
    report.add_argument("--min-ssim", type=float, metavar="X")
    report.add_argument("--min-psnr", type=float, metavar="X", help="in dB")
    report.add_argument(
        "--lpips", metavar="WEIGHTS", help="a .safetensors file of an lpips.LPIPS; needs dfa2-jax[quality]"
    )
    report.add_argument("--clip", metavar="FOLDER", help="a CLIPModel of transformers; needs dfa2-jax[quality]")
    report.add_argument("--image-reward", metavar="FOLDER", help="not supported: says why")
    report.add_argument("--quick", action="store_true", help="no noise floor and no heads, for a gate")
    report.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's; float32 on CPU")
    report.add_argument("--quiet", action="store_true", help="no progress bar")


PIPELINE_OPTIONS = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "skip_guidance_layers",
    "num_images_per_prompt",
    "max_sequence_length",
)


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
    from dfa2_jax.pipeline.pipeline import Pipeline
    from dfa2_jax.plan.plan import Plan

    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        raise PermissionError(f"--out {args.out} is not writable: choose another folder.")
    plan = None if args.plan is None else Plan.load(args.plan)
    pipeline = Pipeline.from_pretrained(args.folder, dtype=args.dtype)
    options = {name: getattr(args, name) for name in PIPELINE_OPTIONS}
    seed = args.seed[0] if len(args.seed) == 1 else args.seed
    output = pipeline(**options, plan=plan, seed=seed, progress=not args.quiet)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images_per_prompt)]
    for index, (image, prompt) in enumerate(zip(output.images, prompts, strict=True)):
        print(save_image(image, args.out, prompt, output.metadata | {"image": index}))
    seconds = {"load": pipeline.load_seconds} | output.timings
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    return 0


CALIBRATION_OPTIONS = (
    "negative_prompt",
    "num_inference_steps",
    "height",
    "width",
    "guidance_scale",
    "max_sequence_length",
    "delta",
    "cache",
    "seed",
    "attention_chunk",
)


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
    options = {name: getattr(args, name) for name in CALIBRATION_OPTIONS}
    options |= {"c": args.c or None, "windows": tuple(args.windows), "tiles": args.tiles and tuple(args.tiles)}
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


REPORT_OPTIONS = (
    "seed",
    "negative_prompt",
    "guidance_scale",
    "batch",
    "dtype",
    "lpips",
    "clip",
    "image_reward",
    "quick",
)


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
    options = {name: getattr(args, name) for name in REPORT_OPTIONS}
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
    draw(plan, picture)
    print(picture)
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
    from dfa2_jax.nn.attention import arrow_implementation, dense_implementation

    for name in ("dfa2-jax", "jax", "jaxlib", "flax", "orbax-checkpoint"):
        try:
            print(f"{name:17s} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:17s} not installed")
    device = devices()[0]
    print(f"{'device':17s} {len(devices())} x {device.device_kind} ({device.platform})")
    print(f"{'driver':17s} {_driver()}")
    for dtype, head_dim, model in (("bfloat16", 64, "SD3"), ("bfloat16", 128, "FLUX.1"), ("float32", 128, "float32")):
        for kind, choose in (("dense", dense_implementation), ("arrow", arrow_implementation)):
            choice = choose(dtype, head_dim)
            print(f"{kind + ' ' + model:17s} {choice.implementation}: {choice.why}")
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        print(f"{'device memory':17s} {free / 1e9:.1f} GB free of {stats['bytes_limit'] / 1e9:.1f} GB that JAX may use")
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(f"{'host memory':17s} {pages / 1e9:.1f} GB free")
    print(f"{'disk':17s} {shutil.disk_usage('.').free / 1e9:.1f} GB free here")
    return 0


def _driver() -> str:
    """NVIDIA's driver version, from the kernel module: nvidia-smi is not in every container."""
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return "no NVIDIA driver"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text())
    return found.group() if found else "unknown"


if __name__ == "__main__":
    sys.exit(main())
