"""What a quality report says: its lines, their statistics, the gate, and the two files that hold them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float

from dfa2_jax.io.atomic import replacing, writable
from dfa2_jax.plan.plan import Plan
from dfa2_jax.report import metrics as quality
from dfa2_jax.report.attention_maps import Masses, draw
from dfa2_jax.report.clips import small
from dfa2_jax.report.metrics import HIGHER_IS_BETTER
from dfa2_jax.report.page import NEARNESS, noun_of, page
from dfa2_jax.weights.dtypes import PRECISIONS

WORST = 5
"""Pairs shown of each plan."""


@dataclass(frozen=True)
class Shot:
    """What one image or video is made from."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Pair:
    """A plan's image, and the dense one of the same prompt and seed. Videos are as small as the page shows them.

    frames: of a video, by metric, each frame's score.
    """

    shot: Shot
    image: quality.Image | quality.Video
    exact: quality.Image | quality.Video
    scores: dict[str, float]
    frames: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Judges:
    """Metrics by name: of an image or a frame against the exact one, and against its prompt."""

    fidelity: dict[str, Callable[[quality.Image, quality.Image], float]]
    suitability: dict[str, Callable[[quality.Image, str], float]]

    def __call__(
        self, video: quality.Video, exact: quality.Video | None, prompt: str, limit: quality.Video | None = None
    ) -> dict[str, list[float]]:
        """Each frame's scores, by metric.

        Args:
            limit: the video of many steps.
        """
        scores = {} if exact is None else {name: by_frame(judge, video, exact) for name, judge in self.fidelity.items()}
        scores |= {name: [judge(frame, prompt) for frame in video] for name, judge in self.suitability.items()}
        return scores if limit is None else scores | {"limit_psnr": by_frame(self.fidelity["psnr"], video, limit)}


def by_frame(
    judge: Callable[[quality.Image, quality.Image], float], video: quality.Video, exact: quality.Video
) -> list[float]:
    return [judge(frame, other) for frame, other in zip(video, exact, strict=True)]


@dataclass(eq=False)
class Line:
    """What the table says of one kind of image or video, filled batch by batch.

    kind: "dense", "plan", "precision", "solver", "floor" or "ceiling".
    changes: arguments of the call that differ from the dense one's.
    against: what its images are compared with.
    scores: by metric, one number for each image or video.
    frames: of videos, by metric, the numbers of each one's frames, whose means are the scores.
    seconds: of a step, in each round.
    not_finite: images with NaN or infinity, which are scored as black there.
    left_out: why there are no numbers.
    """

    name: str
    kind: str
    against: str = ""
    plan: Plan | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    frames: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    not_finite: int = 0
    left_out: str = ""
    worst: list[Pair] = field(default_factory=list, repr=False)

    def add(
        self,
        judges: Judges,
        shots: Sequence[Shot],
        images: np.ndarray,
        exact: np.ndarray | None,
        limit: np.ndarray | None = None,
    ) -> None:
        """Score a batch's images [B, H, W, 3], or videos [B, F, H, W, 3], against the exact ones, and against those of
        many steps."""
        for i, shot in enumerate(shots):
            finite = bool(np.isfinite(images[i]).all())
            self.not_finite += not finite
            image = images[i] if finite else np.nan_to_num(images[i], posinf=0, neginf=0)
            given = None if exact is None else exact[i]
            judged = image, given, None if limit is None else limit[i]
            video, other, many = (None if x is None else x.reshape(-1, *x.shape[-3:]) for x in judged)
            frames = judges(video, other, shot.prompt, many)
            scores = {name: float(np.mean(values)) for name, values in frames.items()}
            if is_video := image.ndim == 4:
                for name, values in frames.items():
                    self.frames.setdefault(name, []).append(values)
                if given is not None:
                    scores["temporal_difference"] = quality.temporal_difference(image, given)
            for name, value in scores.items():
                self.scores.setdefault(name, []).append(value)
            if self.kind == "plan" and given is not None:
                shown = (small(image), small(given)) if is_video else (image, given)
                pairs = [*self.worst, Pair(shot, *shown, scores, frames if is_video else {})]
                self.worst = sorted(pairs, key=lambda pair: pair.scores["ssim"])[:WORST]

    def values(self, metric: str, seeds: int) -> Float[np.ndarray, "prompts seeds"]:
        return np.asarray(self.scores[metric]).reshape(-1, seeds)

    def mean(self, metric: str) -> float:
        return float(np.mean(self.scores[metric]))

    def extreme(self, metric: str) -> float:
        """The worst image's, or video's."""
        return (min if HIGHER_IS_BETTER[metric] else max)(self.scores[metric])

    def numbers_by_frame(self, metric: str, seeds: Sequence[int]) -> dict[str, Any]:
        """Every frame's score and the worst one, of videos; prompts and frames count from 0."""
        if metric not in self.frames:
            return {}
        values = np.asarray(self.frames[metric])
        values = values.reshape(-1, len(seeds), values.shape[1])
        place = (np.argmin if HIGHER_IS_BETTER[metric] else np.argmax)(values)
        prompt, seed, frame = map(int, np.unravel_index(place, values.shape))
        worst = {"value": float(values[prompt, seed, frame]), "prompt": prompt, "seed": seeds[seed], "frame": frame}
        return {"worst_frame": worst, "frames": values.tolist()}


def by_precision(
    plans: Mapping[str, Plan], precisions: Sequence[str], own: str | None
) -> tuple[dict[str, Plan], dict[str, dict[str, Plan]]]:
    """Plans of the report's own dtype, and those of each precision beside it.

    Raises:
        ValueError: names what cannot be set beside what.
    """
    if unknown := [one for one in precisions if one not in PRECISIONS or one == own or precisions.count(one) > 1]:
        raise ValueError(f"precisions has {unknown[0]!r}: different ones of {', '.join(PRECISIONS)}, not dtype's own.")
    others = {
        precision: {name: plan for name, plan in plans.items() if plan.setting.precision == precision}
        for precision in precisions
    }
    rest = {name: plan for name, plan in plans.items() if plan.setting.precision not in precisions}
    if not rest:
        names = " and ".join(precisions)
        raise ValueError(f"All plans are of {names}: give one of dtype={own}, too, or dtype={precisions[0]!r}.")
    return rest, others


@dataclass(frozen=True)
class Report:
    """What plans do to images or videos.

    lines: dense, the noise floor from small to large, the plans, another seed.
    limits: by metric, what a plan's mean must keep.
    masses: where heads look, of the first prompt and seed; None if that was not asked for.
    facts: model, machine, versions and arguments; JSON-serialisable.
    """

    lines: tuple[Line, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    limits: dict[str, float]
    masses: Masses | None
    facts: dict[str, Any]

    @property
    def noun(self) -> str:
        """What it compares: "image" or "video"."""
        return noun_of(self.facts)

    def of_kind(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line.kind == kind]

    @property
    def failures(self) -> list[str]:
        """Which plan missed which limit, with both values; empty: the gate is open."""
        failures = []
        for line in self.of_kind("plan"):
            if line.not_finite:
                count = len(line.scores["psnr"])
                failures.append(f"plan {line.name}: {line.not_finite} of {count} {self.noun}s are not finite")
            for metric, limit in self.limits.items():
                mean, worst, higher = line.mean(metric), line.extreme(metric), HIGHER_IS_BETTER[metric]
                if not (mean >= limit if higher else mean <= limit):
                    side = "below" if higher else "above"
                    failures.append(
                        f"plan {line.name}: mean {metric.upper()} {mean:.4f} is {side} the limit {limit:g} "
                        f"(worst {self.noun} {worst:.4f})"
                    )
        return failures

    def distances(self, plan: Line) -> list[dict[str, Any]]:
        """Per line of the noise floor and metric: by how much the plan's mean is worse. `within`: no mean is worse than
        that line's worst image, or video."""
        distances = []
        for floor in self.of_kind("floor"):
            if floor.left_out:
                continue
            metrics = [metric for metric in NEARNESS if metric in plan.scores]
            sign = {metric: 1 if HIGHER_IS_BETTER[metric] else -1 for metric in metrics}
            worse = {metric: sign[metric] * (floor.mean(metric) - plan.mean(metric)) for metric in metrics}
            within = all(sign[metric] * (plan.mean(metric) - floor.extreme(metric)) >= 0 for metric in metrics)
            distances.append({"floor": floor.name, "within": within, **worse})
        return distances

    def speedup(self, plan: Line) -> float:
        """The speedup of a step over a dense one: the median of the rounds' ratios."""
        return median(a / b for a, b in zip(self.lines[0].seconds, plan.seconds, strict=True))

    def content(self) -> dict[str, Any]:
        """All numbers, as JSON knows them."""
        return self.facts | {
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "rows": [self._numbers(line) for line in self.lines],
            "limits": self.limits,
            "failures": self.failures,
            "heads": self.masses
            and {
                "half_windows": list(self.masses.half_windows),
                "text": self.masses.text.round(5).tolist(),
                "near": self.masses.near.round(5).tolist(),
            },
        }

    def _numbers(self, line: Line) -> dict[str, Any]:
        content: dict[str, Any] = {"name": line.name, "kind": line.kind, "against": line.against}
        if line.left_out:
            return content | {"left_out": line.left_out}
        if line.seconds:
            content["seconds_per_step"] = {"median": median(line.seconds), "rounds": line.seconds}
        if line.kind in ("solver", "precision"):
            content["speedup"] = self.speedup(line)
        if line.plan is not None:
            tiles = self.facts["tiles"]
            content |= {"digest": line.plan.digest, "speedup": self.speedup(line), "distances": self.distances(line)}
            content["density"] = {"exact": line.plan.density(), "tiles": line.plan.density(tuple(tiles))}
            if line.plan.setting.precision == self.facts["model"]["precision"]:  # costs are shares of its own dense run
                content["predicted_speedup"] = 1 / line.plan.cost(self.facts["attention_share"])
        metrics = {}
        for metric in line.scores:
            values = line.values(metric, len(self.seeds))
            interval = quality.mean_interval(values.mean(1))
            metrics[metric] = {
                "mean": line.mean(metric),
                "worst": line.extreme(metric),
                "interval": None if interval is None else list(interval),
                "values": values.tolist(),
            } | line.numbers_by_frame(metric, self.seeds)
        return content | {"not_finite": line.not_finite, "metrics": metrics}

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write report.json, then report.html, each whole, and return the latter.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder, figures = writable(Path(folder)), {}
        plans = self.of_kind("plan")
        for line in plans:
            if self.masses is not None and line.plan is not None:
                figures[line.name] = draw(line.plan, self.masses)
        content = self.content()
        html = page(content, {line.name: line.worst for line in plans}, figures)
        with replacing(folder / "report.html") as shown, replacing(folder / "report.json") as numbers:
            text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
            shown.write(html.encode(errors="backslashreplace"))  # of a path that is not UTF-8
            numbers.write(text.encode(errors="backslashreplace"))  # JSON writes it in the same way
        return folder / "report.html"
