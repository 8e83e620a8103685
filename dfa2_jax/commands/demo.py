"""`dfa2 demo`: a model in the box, dense and by its plan, side by side."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

from dfa2_jax.commands.start import read_prompts, start
from dfa2_jax.demo.box import IMAGES, VIDEOS, Boxed, warn_unseen
from dfa2_jax.demo.picture import Frames, Pair, draw
from dfa2_jax.io.atomic import writable
from dfa2_jax.io.images import stem_of
from dfa2_jax.io.terminal import print_path
from dfa2_jax.options import Options
from dfa2_jax.pipeline.output import Output, pictures
from dfa2_jax.pipeline.pipeline import Pipeline
from dfa2_jax.pipeline.timing import told
from dfa2_jax.plan.plan import Plan

NEXT = (
    "With a model of your own: dfa2 calibrate FOLDER --prompts FILE --out plan.json, then "
    "dfa2 sample FOLDER --plan plan.json --prompt TEXT --out images."
)


def run(args: argparse.Namespace) -> int:
    writable(args.out)
    start()
    boxed = VIDEOS if args.video else IMAGES
    with told("loading"):
        pipeline = Pipeline.from_pretrained(boxed.folder)
    return show(pipeline, boxed, args.prompt or read_prompts(boxed.prompts), args.out)


def show(pipeline: Pipeline, boxed: Boxed, prompts: Sequence[str], out: Path) -> int:
    """Makes every image anew, whatever lies in `out`: a time is of this run. The picture grows with each pair.

    Returns:
        1 where an image cannot be right, else 0.
    """
    warn_unseen(pipeline.fingerprint, prompts)
    plan, is_video = Plan.load(boxed.plan), boxed is VIDEOS
    suffix, what = (".webp", "video") if is_video else (".png", "image")
    picture, pairs, is_sound = out / f"demo{suffix}", [], True
    for number, prompt in enumerate(prompts, 1):
        outputs = []
        for name, options in both(pipeline, plan, prompt).items():
            print(f"{what} {number} of {len(prompts)}, {name}: {prompt}", file=sys.stderr)
            phase = told if number == 1 else nullcontext  # one shape: later prompts compile nothing
            output = pipeline.sample(options, phase)
            if options.plan is not None:
                output = replace(output, metadata=output.metadata | {"plan_file": str(boxed.plan)})
            (path,) = output.save(out / f"{number}-{stem_of(prompt, None)}-{name}{suffix}")
            print_path(path)
            is_sound &= not output.faults
            outputs.append(output)
        pairs.append(pair_of(prompt, *outputs))
        draw(pairs, in_words(plan), picture, outputs[0].metadata["fps"] if is_video else None)
    print_path(picture)
    print(f"{summary(pairs, plan, what)}\n{NEXT}", file=sys.stderr)
    return 0 if is_sound else 1


def both(pipeline: Pipeline, plan: Plan, prompt: str) -> dict[str, Options]:
    """The dense call of one prompt, and the plan's: alike in all that the plan says."""
    planned = Options(prompt=prompt, plan=plan)
    request = pipeline.request(planned)
    dense = replace(
        planned,
        plan=None,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        max_sequence_length=request.length,
    )
    return {"dense": dense, "plan": planned}


def pair_of(prompt: str, dense: Output, planned: Output) -> Pair:
    def frames(output: Output) -> Frames:
        return pictures(output.images)[:1] if output.frames is None else output.frames[0]

    return Pair(prompt, (frames(dense), frames(planned)), (dense.timings["denoise"], planned.timings["denoise"]))


def in_words(plan: Plan) -> str:
    """What a plan runs."""
    density = plan.density()
    return plan.steps_in_words + (f" with {density:.0%} of the query-key pairs" if density < 1 else "")


def summary(pairs: Sequence[Pair], plan: Plan, what: str) -> str:
    """What was seen, in one sentence."""
    dense, planned = (median(pair.seconds[i] for pair in pairs) for i in range(2))
    lowest = min(pair.psnr() for pair in pairs)
    return (
        f"By the plan, which runs {in_words(plan)}, each {what} took {planned:.1f} s instead of {dense:.1f} s. "
        f"It differed from the dense one by a PSNR of {lowest:.1f} dB or better."
    )
