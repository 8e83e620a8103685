"""What a quality report says: its rows, their statistics, the gate, and the two files that hold them."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dfa2_jax.io.atomic import replacing
from dfa2_jax.plan.plan import Plan
from dfa2_jax.report import metrics as quality
from dfa2_jax.report.attention_maps import Masses, draw
from dfa2_jax.report.attention_share import predicted_speedup
from dfa2_jax.report.page import page

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False, "clip": True}
WORST = 5
"""Pairs shown of each plan."""


class Shot(NamedTuple):
    """What one image is made from."""

    prompt: str
    seed: int


class Pair(NamedTuple):
    """A plan's image, and the dense one of the same prompt and seed."""

    shot: Shot
    image: quality.Image
    exact: quality.Image
    scores: dict[str, float]


class Judges(NamedTuple):
    """Metrics by name: of an image against the exact one, and against its prompt."""

    fidelity: dict[str, Callable[[quality.Image, quality.Image], float]]
    suitability: dict[str, Callable[[quality.Image, str], float]]

    def __call__(self, image: quality.Image, exact: quality.Image | None, prompt: str) -> dict[str, float]:
        near = {} if exact is None else {name: judge(image, exact) for name, judge in self.fidelity.items()}
        return near | {name: judge(image, prompt) for name, judge in self.suitability.items()}


@dataclass(eq=False)
class Row:
    """One line of the table, filled batch by batch.

    kind: "dense", "plan", "floor" or "ceiling".
    against: what its images are compared with.
    scores: by metric, one number for each image.
    seconds: of a step, in each round.
    not_finite: images with NaN or infinity, which are scored as black there.
    left_out: why there are no numbers.
    """

    name: str
    kind: str
    against: str = ""
    plan: Plan | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    not_finite: int = 0
    left_out: str = ""
    worst: list[Pair] = field(default_factory=list, repr=False)

    def add(self, judges: Judges, shots: Sequence[Shot], images: np.ndarray, exact: np.ndarray | None) -> None:
        """Score a batch's images [B, H, W, 3] against the exact ones."""
        for i, shot in enumerate(shots):
            finite = bool(np.isfinite(images[i]).all())
            self.not_finite += not finite
            image = images[i] if finite else np.nan_to_num(images[i], posinf=0, neginf=0)
            scores = judges(image, None if exact is None else exact[i], shot.prompt)
            for name, value in scores.items():
                self.scores.setdefault(name, []).append(value)
            if self.kind == "plan" and exact is not None:
                pairs = [*self.worst, Pair(shot, image, exact[i], scores)]
                self.worst = sorted(pairs, key=lambda pair: pair.scores["ssim"])[:WORST]

    def values(self, metric: str, seeds: int) -> Float[np.ndarray, "prompts seeds"]:
        return np.asarray(self.scores[metric]).reshape(-1, seeds)

    def mean(self, metric: str) -> float:
        return float(np.mean(self.scores[metric]))

    def extreme(self, metric: str) -> float:
        """The worst image's."""
        return (min if HIGHER_IS_BETTER[metric] else max)(self.scores[metric])


@dataclass(frozen=True)
class Report:
    """What was found.

    rows: dense, the noise floor from small to large, the plans, another seed.
    limits: by metric, what a plan's mean must keep.
    masses: where heads look, of the first prompt and seed; None if that was not asked for.
    facts: model, machine, versions and arguments; JSON-serialisable.
    """

    rows: tuple[Row, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    limits: dict[str, float]
    masses: Masses | None
    facts: dict[str, Any]

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]

    @property
    def failures(self) -> list[str]:
        """Which plan missed which limit, with both values; empty: the gate is open."""
        found = []
        for row in self.of_kind("plan"):
            if row.not_finite:
                found.append(f"plan {row.name}: {row.not_finite} of {len(row.scores['psnr'])} images are not finite")
            for metric, limit in self.limits.items():
                mean, worst, higher = row.mean(metric), row.extreme(metric), HIGHER_IS_BETTER[metric]
                if not (mean >= limit if higher else mean <= limit):
                    side = "below" if higher else "above"
                    found.append(
                        f"plan {row.name}: mean {metric.upper()} {mean:.4f} is {side} the limit {limit:g} "
                        f"(worst image {worst:.4f})"
                    )
        return found

    def distances(self, plan: Row) -> list[dict[str, Any]]:
        """From each row of the noise floor: by metric, how much worse the plan's mean is; within: in no metric is it
        worse than the floor's worst image."""
        found = []
        for floor in self.of_kind("floor"):
            if floor.left_out:
                continue
            metrics = [metric for metric in ("psnr", "ssim", "lpips") if metric in plan.scores]
            sign = {metric: 1 if HIGHER_IS_BETTER[metric] else -1 for metric in metrics}
            one = {metric: sign[metric] * (floor.mean(metric) - plan.mean(metric)) for metric in metrics}
            within = all(sign[metric] * (plan.mean(metric) - floor.extreme(metric)) >= 0 for metric in metrics)
            found.append({"floor": floor.name, "within": within, **one})
        return found

    def speedup(self, plan: Row) -> float:
        """Of a step, over dense: the median of the rounds' ratios."""
        return median(a / b for a, b in zip(self.rows[0].seconds, plan.seconds, strict=True))

    def content(self) -> dict[str, Any]:
        """All numbers, as JSON knows them."""
        return self.facts | {
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "rows": [self._row(row) for row in self.rows],
            "limits": self.limits,
            "failures": self.failures,
            "heads": self.masses
            and {
                "half_windows": list(self.masses.half_windows),
                "text": self.masses.text.round(5).tolist(),
                "near": self.masses.near.round(5).tolist(),
            },
        }

    def _row(self, row: Row) -> dict[str, Any]:
        content: dict[str, Any] = {"name": row.name, "kind": row.kind, "against": row.against}
        if row.left_out:
            return content | {"left_out": row.left_out}
        if row.seconds:
            content["seconds_per_step"] = {"median": median(row.seconds), "rounds": row.seconds}
        if row.plan is not None:
            tiles = self.facts["tiles"]
            content |= {"digest": row.plan.digest, "speedup": self.speedup(row), "distances": self.distances(row)}
            content["density"] = {"exact": row.plan.density(), "tiles": row.plan.density(tuple(tiles))}
            content["predicted_speedup"] = predicted_speedup(self.facts["attention_share"], row.plan.density())
        metrics = {}
        for metric in row.scores:
            values = row.values(metric, len(self.seeds))
            interval = quality.mean_interval(values.mean(1))
            metrics[metric] = {
                "mean": row.mean(metric),
                "worst": row.extreme(metric),
                "interval": None if interval is None else list(interval),
                "values": values.tolist(),
            }
        return content | {"not_finite": row.not_finite, "metrics": metrics}

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write report.html and report.json, both whole or neither, and return the first.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder, figures = writable(Path(folder)), {}
        for row in self.of_kind("plan"):
            if self.masses is not None and row.plan is not None:
                figures[row.name] = draw(row.plan, self.masses)
        content = self.content()
        html = page(content, {row.name: row.worst for row in self.of_kind("plan")}, figures)
        with replacing(folder / "report.html") as shown, replacing(folder / "report.json") as numbers:
            shown.write(html.encode())
            numbers.write((json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode())
        return folder / "report.html"


def writable(folder: Path) -> Path:
    """The folder, made if need be.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable: choose another folder.")
    return folder
