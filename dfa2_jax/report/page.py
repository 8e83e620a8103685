"""A quality report as one HTML file: nothing beside it, no script."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from dfa2_jax.report.clips import side_by_side, stride, webp
from dfa2_jax.report.metrics import EQUAL_PSNR, HIGHER_IS_BETTER

METRICS = {
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "temporal_difference": ("temporal difference", 5),
    "limit_psnr": ("PSNR to the limit, dB", 2),
    "clip": ("CLIP score", 2),
}
"""Title and decimals."""

NEARNESS = ("psnr", "ssim", "lpips", "temporal_difference")
"""The metrics that compare with the dense image or video; the last one is of videos alone."""

FRAMES = (
    " A video's score is the mean of its frames', which count from 0; of PSNR it is the mean of dB. Temporal "
    "difference: the mean of |(x[t+1] - x[t]) - (y[t+1] - y[t])| over pixels and frames, 0 for equal motion."
)
"""What scores of videos are."""

WIDEST = 384
"""Pixels of a picture's longer side at most: five pairs at 2048 px would have 100 MB."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
tr.plan { background: #eef4ff; font-weight: 600; } small { color: #666; font-weight: 400; }
.failed, .passed { border-left: .4rem solid #c0392b; padding-left: 1rem; } .passed { border-color: #2e8b57; }
figure { margin: 1.5rem 0; } figcaption { overflow-wrap: anywhere; } .pair { display: flex; gap: .6rem; }
.pair span { flex: 1 1 0; max-width: 24rem; } .pair img { width: 100%; image-rendering: pixelated; display: block; }
.facts td, td.prompt { white-space: normal; } .facts td { text-align: left; }
img { max-width: 100%; } code { overflow-wrap: anywhere; }
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'"
"""What the page may load: its pictures and this style; no script, no address, whatever a prompt or a name holds."""


def page(content: Mapping[str, Any], worst: Mapping[str, Sequence[Any]], figures: Mapping[str, bytes]) -> str:
    """
    Args:
        content: `Report.content`, from which all numbers come.
        worst: by plan, its worst pairs of images or videos (`table.Pair`).
        figures: by plan, a PNG of what its heads do.
    """
    rows = content["rows"]
    plans, is_video = [row for row in rows if row["kind"] == "plan"], noun_of(content) == "video"
    parts = [f"<h1>Quality of {_text(', '.join(row['name'] for row in plans))}</h1>", _intro(content)]
    parts += [_gate(content), "<h2>Quality and time</h2>", _table(content), _notes(content)]
    if any(row["distances"] for row in plans):
        parts += ["<h2>Distance to the noise floor</h2>", *(_distances(row, rows, noun_of(content)) for row in plans)]
    for row in plans:
        parts.append(f"<h2>Worst pairs of {_text(row['name'])}, by SSIM</h2>")
        parts += [_clip(pair, content) if is_video else _pair(pair) for pair in worst[row["name"]]]
    for name, png in figures.items():
        parts += [f"<h2>What the heads do, and what {_text(name)} gives them</h2>", _heads(content, png)]
    parts += [f"<h2>Every {noun_of(content)}</h2>", _details(content), "<h2>How it was made</h2>", _origin(content)]
    title = "Quality report"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head = f'<meta charset="utf-8">{policy}<meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def noun_of(content: Mapping[str, Any]) -> str:
    """What a report compares, by its content: "image" or "video"."""
    return "image" if content.get("arguments", {}).get("num_frames") is None else "video"


def _text(value: object) -> str:
    """Text of whatever script and direction, kept apart from the text around it."""
    return f'<bdi dir="auto">{escape(str(value))}</bdi>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _intro(content: Mapping[str, Any]) -> str:
    model, made = content["model"], content["arguments"]
    counted = f"{_count(len(content['prompts']), 'prompt')} x {_count(len(content['seeds']), 'seed')}"
    device, noun = escape(content["machine"]["device"]), noun_of(content)
    frames = f"{_count(made['num_frames'], 'frame')} at {made['fps']} a second, " if noun == "video" else ""
    sampled = f"{frames}{made['num_inference_steps']} steps, guidance {made['guidance_scale']:g}"
    return (
        f"<p>{_text(model['folder'])}, {escape(model['pipeline'])} in {escape(model['dtype'])}: {made['width']} x "
        f"{made['height']}, {sampled}. {counted}; each {noun} against the dense one "
        f"of the same prompt and seed. Made on {device}.</p>"
    )


def _gate(content: Mapping[str, Any]) -> str:
    if content["failures"]:
        lines = "".join(f"<li>{escape(failure)}</li>" for failure in content["failures"])
        return f'<div class="failed"><p><strong>Failed</strong></p><ul>{lines}</ul></div>'
    if not content["limits"]:
        return ""
    limits = ", ".join(f"{name.upper()} {limit:g}" for name, limit in content["limits"].items())
    return f'<div class="passed"><p><strong>Passed</strong>: every mean keeps the limits ({limits}).</p></div>'


def _table(content: Mapping[str, Any]) -> str:
    rows = content["rows"]
    metrics = [metric for metric in METRICS if any(metric in row.get("metrics", {}) for row in rows)]
    rows_keys = "x".join(map(str, content["tiles"]))
    titles = ["", *(METRICS[metric][0] for metric in metrics), "kept pairs", f"kept tiles<br>{rows_keys}", "ms a step"]
    lines = []
    for row in rows:
        name = _text(row["name"]) + (f"<br><small>against {escape(row['against'])}</small>" if row["against"] else "")
        if "left_out" in row:
            lines.append(f'<tr><td>{name}</td><td colspan="{len(titles) - 1}">{escape(row["left_out"])}</td></tr>')
            continue
        cells = [_statistics(metric, row["metrics"].get(metric)) for metric in metrics]
        density = row.get("density", {"exact": 1.0, "tiles": 1.0} if row["kind"] == "dense" else None)
        cells += ["", ""] if density is None else [f"{density['exact']:.3f}", f"{density['tiles']:.3f}"]
        time = row.get("seconds_per_step")
        faster = ""
        if "speedup" in row:
            predicted = f", {row['predicted_speedup']:.2f} predicted" if "predicted_speedup" in row else ""
            faster = f"<br><small>{row['speedup']:.2f} times as fast{predicted}</small>"
        cells.append("" if time is None else f"{1e3 * time['median']:.1f}{faster}")
        if row["not_finite"]:
            name += f"<br><small>{row['not_finite']} {noun_of(content)}s are not finite</small>"
        lines.append(
            f'<tr class="{row["kind"]}"><td>{name}</td>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        )
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _statistics(metric: str, statistics: Mapping[str, Any] | None) -> str:
    if statistics is None:
        return ""
    numbers = statistics["mean"], statistics["worst"], *(statistics["interval"] or ())
    mean, worst, *ends = (_number(metric, number) for number in numbers)
    return f"{mean}<br><small>{' to '.join(ends) or 'no interval'}<br>worst {worst}{_frame(metric, statistics)}</small>"


def _frame(metric: str, statistics: Mapping[str, Any]) -> str:
    """The worst frame of all videos."""
    worst = statistics.get("worst_frame")
    return "" if worst is None else f"<br>worst frame {_number(metric, worst['value'])}"


def _notes(content: Mapping[str, Any]) -> str:
    is_single, steps = len(content["prompts"]) < 2, content.get("limit_steps")
    limit = f" The limit is of {steps} steps of second order." if steps else ""
    interval = "One prompt: an interval of the mean is not defined." if is_single else (
        f"Below each mean: its 95 % interval (percentile bootstrap over prompts), and the worst {noun_of(content)}."
    )  # fmt: skip
    interval += FRAMES if noun_of(content) == "video" else ""
    return (
        f"<p><small>{interval} Kept: the share of query-key pairs, and of tiles, "
        "that the plan does not skip, predicted. Time: the median of rounds in which dense and plans take turns, "
        f"compilation apart, {content['arguments']['batch']} at a time; the machine's other work is in it. "
        f"Predicted: attention does {content['attention_share']:.0%} of a step's multiplications, a plan the share of "
        f"those that it keeps.{limit}</small></p>"
    )


def _distances(plan: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], noun: str) -> str:
    def gaps(other: str) -> str:
        theirs = next(row for row in rows if row["name"] == other and row["kind"] != "plan")["metrics"]
        return "; ".join(
            _gap(name, plan["metrics"][name]["mean"], theirs[name]["mean"]) for name in NEARNESS if name in theirs
        )

    lines = []
    for distance in plan["distances"]:
        kept = f"within this noise: no mean is worse than its worst {noun}"
        verdict = kept if distance["within"] else "outside of this noise"
        floor = distance["floor"]
        lines.append(f"<li>{escape(floor)}: <strong>{verdict}</strong>. {gaps(floor)}.</li>")
    lines += [f"<li>another seed, for scale. {gaps(row['name'])}.</li>" for row in rows if row["kind"] == "ceiling"]
    return f"<h3>{_text(plan['name'])}</h3><ul>{''.join(lines)}</ul>"


def _gap(metric: str, mine: float, theirs: float) -> str:
    title, decimals = METRICS[metric]
    gap = f"{abs(mine - theirs):.{decimals}f}{' dB' if metric == 'psnr' else ''}"
    better = (mine > theirs) == HIGHER_IS_BETTER[metric]
    relation = "as" if float(f"{mine - theirs:.{decimals}f}") == 0 else f"{gap} {'better' if better else 'worse'} than"
    return f"{title.split(',')[0]} {_number(metric, mine)}, {relation} its {_number(metric, theirs)}"


def _number(metric: str, value: float) -> str:
    return "equal" if metric.endswith("psnr") and value >= EQUAL_PSNR else f"{value:.{METRICS[metric][1]}f}"


def _pair(pair: Any) -> str:
    difference = np.abs(pair.image - pair.exact)
    factor = 1 / max(float(difference.max()), 1e-6)
    shown = ("dense", pair.exact), ("plan", pair.image), (f"difference, {factor:.3g} times", difference * factor)
    spans = "".join(
        f'<span><img alt="{name}" src="{picture(image)}"><small>{name}</small></span>' for name, image in shown
    )
    scores = ", ".join(f"{name.upper()} {_number(name, value)}" for name, value in pair.scores.items())
    caption = f"{_text(pair.shot.prompt)} <small>seed {pair.shot.seed}; {scores}</small>"
    return f'<figure><div class="pair">{spans}</div><figcaption>{caption}</figcaption></figure>'


def _clip(pair: Any, content: Mapping[str, Any]) -> str:
    """A pair of videos as one animation, so that their frames are in step."""
    frames, factor = side_by_side(pair.image, pair.exact)
    step = stride(len(pair.frames["psnr"]))
    shown = f"dense, plan and their difference, {factor:.3g} times{f', every {step} frames' if step > 1 else ''}"
    image = f'<img alt="{shown}" src="{_uri(webp(frames, content["arguments"]["fps"] / step), "webp")}">'
    scores = [f"{METRICS[name][0].split(',')[0]} {_number(name, value)}" for name, value in pair.scores.items()]
    scores += [f"worst {_worst(name, pair.frames[name])}" for name in ("psnr", "ssim")]
    caption = f"{_text(pair.shot.prompt)} <small>seed {pair.shot.seed}; {shown}; {', '.join(scores)}</small>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _worst(metric: str, frames: Sequence[float]) -> str:
    """A video's worst frame, which counts from 0."""
    value = (min if HIGHER_IS_BETTER[metric] else max)(frames)
    return f"{METRICS[metric][0].split(',')[0]} {_number(metric, value)} at frame {frames.index(value)}"


def picture(image: np.ndarray) -> str:
    """A data URI of a PNG of an image [H, W, 3] in [0, 1], of `WIDEST` pixels at most."""
    drawn = Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))
    drawn.thumbnail((WIDEST, WIDEST))
    drawn.save(file := io.BytesIO(), format="PNG")
    return _uri(file.getvalue())


def _uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def _heads(content: Mapping[str, Any], png: bytes) -> str:
    window = content["heads"]["half_windows"][-1]
    order = ", frame by frame: time arrows run over another order" if noun_of(content) == "video" else ""
    caption = (
        f"Dense sampling of {_text(content['prompts'][0])}, seed {content['seeds'][0]}. Locality: of the weight that "
        f"visual queries give visual keys, the share within {window} tokens of the diagonal, the plans' widest "
        f"arrow{order}. On text: their weight on text keys; black where a layer sees none. report.json has all windows."
    )
    image = f'<img alt="attention of every head by step, and its method" src="{_uri(png)}">'
    return f"<figure>{image}<figcaption><small>{caption}</small></figcaption></figure>"


def _details(content: Mapping[str, Any]) -> str:
    plans = [row for row in content["rows"] if row["kind"] == "plan"]
    columns = [(row, metric) for row in plans for metric in row["metrics"]]
    head = "".join(f"<th>{_text(row['name'])}<br>{METRICS[metric][0]}</th>" for row, metric in columns)
    lines = []
    for i, prompt in enumerate(content["prompts"]):
        for j, seed in enumerate(content["seeds"]):
            cells = "".join(f"<td>{_detail(metric, row['metrics'][metric], i, j)}</td>" for row, metric in columns)
            lines.append(f'<tr><td class="prompt">{_text(prompt)}</td><td>{seed}</td>{cells}</tr>')
    table = f"<table><thead><tr><th>prompt</th><th>seed</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    counted = _count(len(lines), noun_of(content))
    return f'<details><summary>{counted}</summary><div class="wide">{table}</div></details>'


def _detail(metric: str, statistics: Mapping[str, Any], prompt: int, seed: int) -> str:
    number, frames = _number(metric, statistics["values"][prompt][seed]), statistics.get("frames")
    return number if frames is None else f"{number}<br><small>worst {_worst(metric, frames[prompt][seed])}</small>"


def _origin(content: Mapping[str, Any]) -> str:
    facts = {f"plan {row['name']}": row["digest"] for row in content["rows"] if row["kind"] == "plan"}
    facts |= {"weights": content["model"]["fingerprint"], **content["machine"], **content["versions"]}
    facts |= content["arguments"] | {"negative prompt": content["negative_prompt"]}
    lines = "".join(
        f"<tr><td>{_text(name)}</td><td><code>{_text(value)}</code></td></tr>" for name, value in facts.items()
    )
    return f'<table class="facts">{lines}</table>'
