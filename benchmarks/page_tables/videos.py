"""Tables of docs/video.md."""

from collections.abc import Iterator
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.page_tables.base import table


@table(
    "videos",
    "videos_gpu.json",
    "model, frames and size | step | ms | over dense | ceiling | over cuDNN's dense | transposing, of a step",
)
def videos(data: Any) -> Iterator[list[str]]:
    for case, one in data["rows"].items():
        ms = one["ms_per_step"]
        cudnn = f"{ms['dense by cuDNN'] / ms['dense']:.2f}x"
        yield [case, "dense", f"{ms['dense']:,.0f}", "", "", cudnn, ""]
        yield ["", "dense by cuDNN", f"{ms['dense by cuDNN']:,.0f}", "", "", "", ""]
        for name, plan in one["plans"].items():
            if "transposing" in plan:
                ratios = (f"{plan[key]:.2f}x" for key in ("speedup", "ceiling", "speedup_over_cudnn"))
                yield ["", name, f"{ms[name]:,.0f}", *ratios, f"{plan['transposing']:.1%}"]


@table(
    "video-vae",
    "video_vae_gpu.json",
    "frames and size | first frames, s | all frames, s | peak, GB | of it carried, GB | weights, GB",
)
def video_vae(data: Any) -> Iterator[list[str]]:
    for case, one in data["rows"].items():
        seconds = (f"{one[name]:.2f}" for name in ("first_frames_s", "decode_s"))
        memory = (f"{one[name]:.1f}" for name in ("peak_gb", "cache_gb", "weights_gb"))
        yield [case, *seconds, *memory]


@table("large-stacks", "large_stacks_gpu.json", "implementation | numbers | layers equal to the bit | others untouched")
def large_stacks(data: Any) -> Iterator[list[str]]:
    for name, one in data["rows"].items():
        equal = [layer for layer, same in one["equal"].items() if same]
        share = f"{', '.join(equal)}: {len(equal)} of {len(one['equal'])}"
        yield [f"`{name}`", f"{one['numbers']:.2g}", share, "yes" if one["others_untouched"] else "no"]


@table(
    "video-checkpoint",
    "video_checkpoint.json",
    "size | captions | background, colours | shapes | directions, speeds | all of a video",
    "python -m toy.video_evaluate",
)
def video_checkpoint(data: Any) -> Iterator[list[str]]:
    for one in data:
        right = one["all"]
        pairs = ("background", "colour"), ("shape",), ("direction", "speed"), ("exact",)
        cells = (f"{min(right[name] for name in names):.1%}" for names in pairs)
        yield [f"{one['size']} px", str(right["captions"]), *cells]


KEPT = 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4


@table(
    "video-orders",
    "video_orders.json",
    f"heads may take | {' | '.join(f'{share:g} kept' for share in KEPT)}",
    "python -m benchmarks.video_orders",
)
def video_orders(data: Any) -> Iterator[list[str]]:
    """PSNR at shares of the pairs; between two plans by a straight line."""
    for kind in dict.fromkeys(point["kind"] for point in data["rows"]):
        points = sorted((point["density"], mean(point["psnr"])) for point in data["rows"] if point["kind"] == kind)
        least, most = points[0][0], points[-1][0]
        at = (f"{np.interp(share, *zip(*points, strict=True)):.1f}" if least <= share <= most else "" for share in KEPT)
        yield [kind, *at]
    yield ["another seed", *[f"{mean(data['floor']['psnr']):.1f}"] * len(KEPT)]
