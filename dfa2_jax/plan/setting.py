"""What a plan is bound to, and how it was found: the records in its file."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from math import log10
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dfa2_jax.weights.dtypes import Precision
from pallas_kernels.layout import Layout

Count = Annotated[int, Field(ge=0, le=10_000_000)]
Positive = Annotated[int, Field(ge=1, le=10_000_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decibels = Annotated[float, Field(ge=-200, le=200)]

MARGIN = 3.0
"""dB that a plan for a PSNR has above it. With it, 28 of 30 plans kept on other prompts what was asked. The other two,
of 11 and 12 in 50 steps, kept 5.6 and 4.5 dB less than they measured (benchmarks/results/promises.json)."""

LOWEST_PSNR = 37.0
"""dB below which a few prompts say little of others: there a plan of 9 of 28 steps measured 37.3 dB, and kept 35.3."""

LARGEST_PSNR = 120.0
"""dB of equal images, and the most that is predicted."""

logger = logging.getLogger("dfa2_jax")


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AttentionLayer(Record):
    """One attention layer of the network."""

    name: Annotated[str, Field(max_length=100)]
    num_text: Count
    num_visual: Positive
    text_first: bool

    @classmethod
    def of(cls, name: str, layout: Layout) -> "AttentionLayer":
        return cls(name=name, num_text=layout.num_text, num_visual=layout.num_visual, text_first=layout.text_first)

    @property
    def layout(self) -> Layout:
        return Layout(self.num_text, self.num_visual, self.text_first)


class Setting(Record):
    """The sampling call that a plan is for."""

    pipeline_class: str
    weights: str
    """Fingerprint of the transformer's stored weights."""
    scheduler: str
    sigmas: Annotated[tuple[Number, ...], Field(strict=False, min_length=2, max_length=1001)]
    """Noise levels: one more than steps, never rising, the last one 0. CogVideoX's can end above 0."""
    height: Positive
    """Pixels."""
    width: Positive
    doubled_batch: bool
    """Guidance runs [unconditional, conditional] as one batch, which shares plan and cache."""
    num_heads: Annotated[int, Field(ge=1, le=256)]
    layers: Annotated[tuple[AttentionLayer, ...], Field(strict=False, min_length=1, max_length=999)]
    """In order of execution."""
    precision: Precision | None = None
    """What blocks that are quantised multiply in. Files say nothing of others."""
    num_frames: Positive | None = None
    """Frames of a video. Files of images say nothing of it."""
    token_frames: Positive = 1
    """Frames of its visual tokens."""
    num_reference: Count = 0
    """Tokens of a reference picture, which layers count as text."""
    use_dynamic_cfg: bool = False
    """Guidance has another scale at each step."""

    @field_validator("sigmas")
    @classmethod
    def _check_sigmas(cls, sigmas: tuple[float, ...], info: Any) -> tuple[float, ...]:
        for number, (high, low) in enumerate(pairwise(sigmas)):
            if low > high:
                raise ValueError(f"noise rises from {high} to {low} (numbers {number} and {number + 1})")
        if sigmas[-1] != 0 and not str(info.data.get("scheduler")).startswith("CogVideoX"):
            raise ValueError(f"the last one is {sigmas[-1]}, not 0")
        return sigmas

    @model_validator(mode="after")
    def _check_frames(self) -> "Setting":
        for layer in self.layers:
            if layer.num_visual % self.token_frames:
                have = f"{layer.name} has {layer.num_visual} visual tokens"
                raise ValueError(f"token_frames={self.token_frames}, but {have}, which are no such equal frames")
        return self

    @property
    def size_in_words(self) -> str:
        """Such as "256 x 256", and "49 frames of 480 x 720"."""
        size = f"{self.height} x {self.width}"
        return size if self.num_frames is None else f"{self.num_frames} frames of {size}"

    @property
    def num_inference_steps(self) -> int:
        return len(self.sigmas) - 1

    def content(self) -> dict[str, Any]:
        """As files and digests have it."""
        return self.model_dump(mode="json", exclude_defaults=True)


class UnfittedRun(Record):
    """What a plan kept whose coefficients are of gram alone, on the calibration prompts."""

    predicted_error: NotNegative
    """As in `StepCalibration`."""
    measured_psnr: Decibels
    """Mean PSNR of the run's images against the target's, in dB."""


def decibels(error: float) -> float:
    """A mean square in dB, `-LARGEST_PSNR` at least."""
    return 10 * log10(max(error, 10 ** (-LARGEST_PSNR / 10)))


def predicted_psnr(runs: Sequence[UnfittedRun], error: float) -> float:
    """In dB against the target's images, of an unfitted plan with this predicted error; a smaller one never has less.

    Between the runs that were measured it is a line. Below them the line goes on, with 1 dB for each dB of the error at
    least. Above them it is 1 dB for each dB: measured, no more is gained there. A run without error is the
    target's own, and says nothing of others.
    """
    quality = -decibels(error)
    if quality >= LARGEST_PSNR or not (runs := [run for run in runs if run.predicted_error > 0]):
        return quality
    expected, measured = np.array(sorted((-decibels(run.predicted_error), run.measured_psnr) for run in runs)).T
    measured = np.maximum.accumulate(measured)
    slope = max(np.ptp(measured) / (np.ptp(expected) or np.inf), 1.0)
    beyond = slope * min(quality - expected[0], 0) + max(quality - expected[-1], 0)
    return min(float(np.interp(quality, expected, measured) + beyond), LARGEST_PSNR)


class StepCalibration(Record):
    """How the steps of a plan were found, and all that is needed to find others without a model."""

    prompts_sha256: str
    """The sha256 of prompts, negative prompt and pictures."""
    num_prompts: Positive
    seed: int
    guidance_scale: Number
    true_cfg_scale: Number = 1.0
    """Files of calls without it say nothing of it."""
    dtype: str
    """The transformer's dtype."""
    versions: dict[str, str]
    target: Literal["dense", "converged"] = "dense"
    """What the plan comes near to: the run of every step, or the limit of many more."""
    gram: Annotated[tuple[Annotated[tuple[Number, ...], Field(strict=False)], ...], Field(strict=False)]
    """Mean products of the target's velocities; of a converged one, then of its moves from level to level."""
    growth: Annotated[tuple[NotNegative, ...], Field(strict=False)]
    """By noise level: what a squared error there has grown by at the end."""
    unfitted: Annotated[tuple[UnfittedRun, ...], Field(strict=False, min_length=1, max_length=8)]
    """Runs that show what PSNR a predicted error comes to: measured once, for all plans."""
    predicted_error: NotNegative
    """Mean squared error of the latents at the end, by gram and growth alone."""
    measured_error: NotNegative | None
    """The same, of the plan's own run on the calibration prompts; None: the plan never ran."""
    measured_psnr: Decibels | None = None
    """Mean PSNR of that run's images against the target's, in dB."""
    attention_share: Share = 0.0
    """The share of a dense step's time that is attention's; 0: heads were not planned."""
    projection_share: Share = 0.0
    """The share that is projections to queries, keys and values."""
    tiles: Annotated[tuple[Positive, Positive], Field(strict=False)] | None = None
    """Queries and keys of the tiles that heads were planned to spare."""

    @model_validator(mode="after")
    def _check_shares(self) -> "StepCalibration":
        if (total := self.attention_share + self.projection_share) > 1:
            raise ValueError(f"attention_share and projection_share are {total} of a step together, not 1 at most")
        if (self.measured_error is None) != (self.measured_psnr is None):
            raise ValueError("measured_error and measured_psnr are of one run: both are there, or both null")
        return self

    def predicted_psnr(self, error: float) -> float:
        """In dB against the target's images, of a plan with this predicted error, which never ran."""
        return predicted_psnr(self.unfitted, error)

    @property
    def psnr(self) -> float:
        """In dB against the target's images: measured where the plan ran, else predicted."""
        return self.predicted_psnr(self.predicted_error) if self.measured_psnr is None else self.measured_psnr

    def check_of_every_step(self, psnr: float, promised: float, steps: int, advice: str = "") -> None:
        """What a plan has to say that runs every step, because no other promises so much; in dB.

        Raises:
            ValueError: the target is the limit, and every step promises less, too.
        """
        if self.target == "converged" and promised < psnr:
            raise ValueError(
                f"{psnr=} to the limit is more than {steps} steps can promise, {promised:.1f} dB. Ask for less, or "
                f"take more steps.{advice}"
            )
        logger.warning("no plan of fewer steps promises psnr=%g: every step runs", psnr)

    def warn_if_low(self) -> None:
        """Below `LOWEST_PSNR`, whoever asked for a plan should know."""
        if (promised := self.psnr - MARGIN) < LOWEST_PSNR:
            logger.warning(
                "the plan promises %.1f dB on average; below %.0f dB other prompts can be worse", promised, LOWEST_PSNR
            )


class Density(Record):
    exact: Share
    tiles: Share


class CalibrationRecord(Record):
    """How a plan was found."""

    prompts_sha256: str
    """The sha256 of prompts, negative prompt and pictures."""
    num_prompts: Positive
    seed: int
    guidance_scale: Number
    true_cfg_scale: Number = 1.0
    """Files of calls without it say nothing of it."""
    dtype: str
    """The transformer's dtype."""
    delta: NotNegative
    c: NotNegative | None
    candidates: Annotated[tuple[str, ...], Field(strict=False)]
    tiles: Annotated[tuple[Positive, Positive], Field(strict=False)]
    """Queries and keys of the tiles whose savings were weighed."""
    versions: dict[str, str]
    predicted_density: Density
    errors: Annotated[tuple[Annotated[tuple[NotNegative, ...], Field(strict=False)], ...], Field(strict=False)]
    """By step and layer: relative squared errors of what was chosen, added up over the heads."""
