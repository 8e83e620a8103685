"""A plan: the method of every step, attention layer and head, as data (arXiv 2503.22796)."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from dfa2_jax.io.atomic import replacing
from dfa2_jax.io.digest import digest_of
from dfa2_jax.io.errors import printable
from dfa2_jax.io.names import natural, suggests_names
from dfa2_jax.plan.file import blame_file, content_of, read, written
from dfa2_jax.plan.method import FULL_METHOD, Method, PlanError, check_methods
from dfa2_jax.plan.setting import MARGIN, CalibrationRecord, Setting, StepCalibration
from dfa2_jax.plan.steps import StepSearch, check_budget, count_for, euler_coefficients
from pallas_kernels.layout import CACHED, FULL
from pallas_kernels.mask import count_tiles, kept_pairs

EULER = np.zeros((0, 2))
"""In place of coefficients: Euler's."""

LARGEST_COEFFICIENT = 100.0
"""Far above what calibration finds: one velocity moves x by the step's noise at most."""


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The method of every head at every step of one kind of sampling call.

    Attributes:
        choices: [nodes, layers, heads], numbers of `methods`; full at the first node.
        calibration: how the heads were found.
        edited: changed since it was calibrated.
        nodes: the steps at which the network runs, the first of them 0; from (): all.
        coefficients: [nodes, 2]: x moves from a node to the next by these times the node's velocity and the last
            one's; from an empty array: Euler's.
        step_calibration: how the nodes were found.

    Raises:
        PlanError: choices, nodes or coefficients do not fit the setting, or the first step is not full.
    """

    setting: Setting
    methods: tuple[Method, ...]
    choices: UInt8[np.ndarray, "nodes layers heads"]
    calibration: CalibrationRecord | None = None
    edited: bool = False
    nodes: tuple[int, ...] = ()
    coefficients: Float[np.ndarray, "empty_or_nodes 2"] = field(default_factory=lambda: EULER)
    step_calibration: StepCalibration | None = None

    def __post_init__(self) -> None:
        setting = self.setting
        self._check_nodes()
        if self.step_calibration is not None:
            self.search(self.step_calibration)
        shape = (len(self.nodes), len(setting.layers), setting.num_heads)
        if self.choices.shape != shape:
            raise PlanError(
                f"choices are {list(self.choices.shape)}, but the setting has steps, layers, heads {shape}."
            )
        check_methods(self.methods, setting.token_frames)
        if self.choices.max() >= len(self.methods):
            raise PlanError(f"choices go up to {self.choices.max()}, but there are {len(self.methods)} methods.")
        full = [number for number, method in enumerate(self.methods) if method == FULL_METHOD]
        early = ~np.isin(self.choices[0], full)
        if early.any():
            layer, head = np.argwhere(early)[0]
            method = self.methods[self.choices[0, layer, head]]
            raise PlanError(
                f"steps[0].{setting.layers[layer].name}: head {head} is {method}, but the first step is always full: "
                "there is no output to reuse yet, and later steps reuse this one's."
            )
        object.__setattr__(self, "choices", self.choices.copy())
        self.choices.flags.writeable = False

    def _check_nodes(self) -> None:
        """Fills in what is empty, and raises PlanError where nodes or coefficients cannot be."""
        steps = self.setting.num_inference_steps
        nodes = tuple(self.nodes) or tuple(range(steps))
        are_steps = all(isinstance(node, int | np.integer) for node in nodes)
        if not are_steps or nodes[0] != 0 or nodes[-1] >= steps or any(a >= b for a, b in pairwise(nodes)):
            raise PlanError(f"nodes are {list(nodes)!s:.200}: integers must rise from 0 to at most {steps - 1}.")
        coefficients = self.coefficients
        if not len(coefficients):
            coefficients = euler_coefficients(np.asarray(self.setting.sigmas)[[*nodes, -1]]).astype(np.float64)
        if coefficients.shape != (len(nodes), 2) or not np.isfinite(coefficients).all():
            raise PlanError(
                f"coefficients are {list(coefficients.shape)}: for {len(nodes)} nodes, two finite numbers each."
            )
        if (largest := np.abs(coefficients).max()) > LARGEST_COEFFICIENT:
            raise PlanError(f"coefficients go to {largest:g}: none of a velocity is above {LARGEST_COEFFICIENT:g}.")
        if coefficients[0, 1] != 0:
            raise PlanError(f"coefficients[0][1] is {coefficients[0, 1]}, but there is no velocity before it.")
        coefficients = coefficients.astype(np.float64)
        coefficients.flags.writeable = False
        object.__setattr__(self, "nodes", tuple(map(int, nodes)))
        object.__setattr__(self, "coefficients", coefficients)

    @property
    def runs_every_step(self) -> bool:
        """Whether its steps are the dense run's: it differs in heads alone."""
        euler = euler_coefficients(np.asarray(self.setting.sigmas))
        return len(self.nodes) == len(euler) and np.array_equal(self.coefficients, euler)

    @property
    def heads_are_full(self) -> bool:
        """Whether it differs from the dense run in steps alone."""
        return bool((self.half_windows() == FULL).all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        setting, edited = self.setting, ", edited by hand" if self.edited else ""
        guided = ", guided" if setting.doubled_batch else ""
        size = f"{setting.size_in_words}, {self.steps_in_words}{guided}"
        methods = ", ".join(f"{method} {share:.1%}" for method, share in self.shares().items())
        return (
            f"Plan for {printable(setting.pipeline_class)}: {size}\n"
            f"  heads: {methods}\n"
            f"  density {self.density():.3f} of query-key pairs, {self.digest[:19]}{edited}"
        )

    @property
    def steps_in_words(self) -> str:
        """Such as "10 of 20 steps"."""
        nodes, steps = len(self.nodes), self.setting.num_inference_steps
        return f"{steps} steps" if nodes == steps else f"{nodes} of {steps} steps"

    @classmethod
    def full(cls, setting: Setting, nodes: tuple[int, ...] = ()) -> "Plan":
        """Every head in full: what others are made from by `with_method`.

        Args:
            nodes: the steps at which the network runs, with Euler's steps between them; (): all.
        """
        count = len(nodes) or setting.num_inference_steps
        choices = np.zeros((count, len(setting.layers), setting.num_heads), np.uint8)
        return cls(setting, (FULL_METHOD,), choices, nodes=nodes)

    def half_windows(self) -> Int[np.ndarray, "steps layers heads"]:
        """As `arrow_attention` takes them, int32: in tokens, from each layer's own number of visual ones."""
        table = [[method.half_window(layer.num_visual) for method in self.methods] for layer in self.setting.layers]
        layers = np.arange(len(table))[None, :, None]
        return np.array(table, np.int32)[layers, self.choices]

    def head_order(self) -> Int[np.ndarray, "steps layers heads"]:
        """Heads with most work first, int32."""
        windows = self.half_windows()
        work = np.where(windows == FULL, np.iinfo(np.int32).max, windows)
        return np.argsort(-work.astype(np.int64), axis=2, kind="stable").astype(np.int32)

    @suggests_names
    def density(self, tiles: tuple[int, int] | None = None) -> float:
        """The kept share of all query-key pairs, or the visited share of tiles of these many queries and keys."""
        kept, total, windows = 0, 0, self.half_windows()
        for number, layer in enumerate(self.setting.layers):
            distinct, counts = np.unique(windows[:, number], return_counts=True)
            if tiles is None:
                of_each, every = kept_pairs(distinct, layer.layout), layer.layout.length**2
            else:
                of_each, _, every = count_tiles(distinct, layer.layout, *tiles)
            kept, total = kept + int((of_each * counts).sum()), total + int(every) * int(counts.sum())
        return kept / total

    @suggests_names
    def cost(self, attention_share: float | None = None, projection_share: float | None = None) -> float:
        """The share of the dense run's time that the plan takes, by its nodes and by what heads save at them.

        Args:
            attention_share: of a dense step's time, which attention takes in proportion to its tiles (Amdahl's law).
                None: what the heads were planned with, without which heads save nothing, as by `delta`.
            projection_share: the same of projections, which reused heads spare.

        Raises:
            ValueError: shares that are none.
        """
        record = self.step_calibration
        planned = (0.0, 0.0) if record is None else (record.attention_share, record.projection_share)
        given = (attention_share, projection_share)
        attention, projections = (a if b is None else b for a, b in zip(planned, given, strict=True))
        if not (attention >= 0 and projections >= 0 and attention + projections <= 1):
            raise ValueError(
                f"{attention_share=} and {projection_share=} must be shares of a step, 1 at most together."
            )
        tokens = np.array([layer.layout.length for layer in self.setting.layers])
        reused = (tokens * (self.half_windows() == CACHED).mean((0, 2))).sum() / tokens.sum()
        spared = attention * (1 - self.density(record and record.tiles)) + projections * float(reused)
        return len(self.nodes) / self.setting.num_inference_steps * (1 - spared)

    @suggests_names
    def resolve(self, *, speedup: float | None = None, psnr: float | None = None) -> "Plan":
        """A plan of steps for another budget, of the same measurements; needs no model. All heads are full.

        Its coefficients are of the dense run's velocities. `calibrate` fits them to the plan's own, which is better.

        Raises:
            PlanError: the plan's steps were not calibrated.
            ValueError: not one budget, or one that no plan keeps.
        """
        record = self.step_calibration
        if record is None:
            raise PlanError("the plan has no step_calibration: `calibrate(pipeline, prompts, speedup=...)` makes one.")
        speedup, psnr = natural(speedup), natural(psnr)
        check_budget(speedup=speedup, psnr=psnr)
        search = self.search(record)
        if speedup is not None:
            nodes = search.nodes(count_for(speedup, search.num_steps))
        else:
            assert psnr is not None
            nodes = search.for_psnr(psnr + MARGIN, record.predicted_psnr)
            if len(nodes.steps) == search.num_steps:
                promised = record.predicted_psnr(nodes.predicted_error) - MARGIN
                record.check_of_every_step(psnr, promised, search.num_steps)
        kept = {"predicted_error": nodes.predicted_error, "measured_error": None, "measured_psnr": None}
        kept |= {"tiles": None, "attention_share": 0.0, "projection_share": 0.0}
        record = record.model_copy(update=kept)
        record.warn_if_low()
        plan = Plan.full(self.setting, nodes.steps)
        return replace(plan, coefficients=nodes.coefficients, step_calibration=record, edited=self.edited)

    def search(self, record: StepCalibration) -> StepSearch:
        """What finds steps by a calibration; raises PlanError where the record is of no run of the setting."""
        try:
            search = StepSearch(*(np.array(x, np.float64) for x in (self.setting.sigmas, record.gram, record.growth)))
            if search.is_moved != (record.target == "converged"):
                raise ValueError(f"gram {search.gram.shape} is not of a run with target={record.target!r}.")
            return search
        except ValueError as error:
            raise PlanError(f"step_calibration: {error}") from error

    def shares(self) -> dict[str, float]:
        """By method, the share of all steps, layers and heads that take it."""
        counts = np.bincount(self.choices.ravel(), minlength=len(self.methods))
        return {str(method): count / self.choices.size for method, count in zip(self.methods, counts, strict=True)}

    @suggests_names
    def with_method(self, steps: Any, layers: Any, heads: Any, method: Method | str) -> "Plan":
        """With another method for some heads. Steps, layers and heads are a number, a slice, a list, or None for all;
        layers also names. Steps are the nodes, numbered from 0.

        Raises:
            PlanError: there is no such node, layer or head, or step 0 would not be full.
        """
        method = Method(method) if isinstance(method, str) else method
        methods = self.methods if method in self.methods else (*self.methods, method)
        names = [layer.name for layer in self.setting.layers]
        chosen = [
            _select(name, selector, size)
            for name, selector, size in zip(
                ("nodes", "layers", "heads"), (steps, _numbers(layers, names), heads), self.choices.shape, strict=True
            )
        ]
        choices = self.choices.copy()
        choices[np.ix_(*chosen)] = methods.index(method)
        return replace(self, methods=methods, choices=choices, edited=True)

    @suggests_names
    def for_weights(self, pipeline: Any) -> "Plan":
        """For other weights of the same model, a fine-tune or LoRA: the caller knows whether its heads behave alike.

        Args:
            pipeline: a `Pipeline`, or the fingerprint of its weights.
        """
        weights = pipeline if isinstance(pipeline, str) else pipeline.fingerprint
        return replace(self, setting=self.setting.model_copy(update={"weights": weights}), edited=True)

    def check(self, setting: Setting) -> None:
        """Whether the plan is for this sampling call.

        One whose heads are full serves other sizes and text lengths, too, where the noise levels are the same.

        Raises:
            PlanError: names every field that differs, with both values.
        """
        faults = []
        for name, advice in ADVICE.items():
            if self.heads_are_full and name in ("height", "width", "num_frames", "layers"):
                continue
            mine, theirs = getattr(self.setting, name), getattr(setting, name)
            if name == "sigmas" and len(mine) == len(theirs) and np.allclose(mine, theirs, rtol=0, atol=1e-6):
                continue
            if mine != theirs:
                if name in ("layers", "sigmas"):
                    mine, theirs = _first_difference(mine, theirs, "steps" if name == "sigmas" else "layers")
                faults.append(f"{name} is {mine!s:.200} in the plan and {theirs!s:.200} in the call: {advice}")
        if faults:
            raise PlanError("The plan is for another sampling call.\n" + "\n".join(faults))

    @cached_property
    def digest(self) -> str:
        """sha256 of the content."""
        return digest_of(self._content())

    def _content(self) -> dict[str, Any]:
        content = content_of(self.setting, self.methods, self.choices, self.calibration, self.edited)
        if not self.runs_every_step:
            content |= {"nodes": [*self.nodes], "coefficients": self.coefficients.tolist()}
        if self.step_calibration is not None:
            content["step_calibration"] = self.step_calibration.model_dump(mode="json", exclude_defaults=True)
        return content

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON, whole or not at all."""
        with replacing(Path(path)) as file:
            file.write(written(self._content()))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Plan":
        """Read a plan, and check all that the file alone can show.

        Raises:
            PlanError: what is wrong with which field.
        """
        plan, digest = cls._read(Path(path))
        if plan.digest != digest:
            raise PlanError(
                f"{path}: digest is {digest!r:.100}, but the content's is {plan.digest!r}: it was edited or damaged. "
                f"If the edit is yours, `dfa2 plan sign {path}` checks it and renews the digest."
            )
        return plan

    @classmethod
    def sign(cls, path: str | PathLike[str]) -> "Plan":
        """Accept a file that was edited by hand: check it, mark it, and renew its digest.

        Raises:
            PlanError: as in `load`, but for the digest.
        """
        plan = replace(cls._read(Path(path))[0], edited=True)
        plan.save(path)
        return plan

    @classmethod
    def _read(cls, path: Path) -> tuple["Plan", str]:
        """A plan, and the digest that its file says."""
        file = read(path)
        with blame_file(path):
            methods, choices = file.parse_methods(), file.parse_steps()
            file.check_errors()
            coefficients = np.array(file.coefficients or (), np.float64).reshape(-1, 2)
            steps = file.nodes or (), coefficients, file.step_calibration
            return cls(file.setting, methods, choices, file.calibration, file.edited, *steps), file.digest


ADVICE = {
    "pipeline_class": "a plan serves one kind of model.",
    "weights": "plan.for_weights(pipeline) if these are a fine-tune or a LoRA of the same model, else calibrate anew.",
    "scheduler": "leave it to the plan, or calibrate with this scheduler, by delta= where its steps are not Euler's.",
    "sigmas": "leave num_inference_steps and sigmas to the plan, pass the scheduler's config it had, or calibrate.",
    "height": "leave it to the plan, or calibrate at this size.",
    "width": "leave it to the plan, or calibrate at this size.",
    "num_frames": "leave it to the plan, or calibrate with this one.",
    "num_reference": "pass a picture of this shape, or calibrate with this one.",
    "doubled_batch": "pass guidance_scale, or true_cfg_scale and negative_prompt, as the plan has it, or calibrate.",
    "use_dynamic_cfg": "leave it to the plan, or calibrate with this kind of guidance.",
    "num_heads": "a plan serves one model.",
    "layers": "leave max_sequence_length to the plan, or calibrate with this one.",
    "precision": "load the pipeline with this dtype, or calibrate with it.",
}
"""What to do where a plan and a call differ."""


def _numbers(layers: Any, names: list[str]) -> Any:
    """Layers by number."""
    listed = [layers] if isinstance(layers, str) else layers
    if not isinstance(listed, list | tuple):
        return listed
    if unknown := [name for name in listed if isinstance(name, str) and name not in names]:
        raise PlanError(f"layers: {unknown} are not among {names[0]} ... {names[-1]}.")
    return [names.index(name) if isinstance(name, str) else name for name in listed]


def _select(name: str, selector: Any, size: int) -> list[int]:
    if selector is None:
        return list(range(size))
    if isinstance(selector, slice):
        return list(range(*selector.indices(size)))
    numbers = [int(number) for number in (selector if isinstance(selector, Iterable) else [selector])]
    if outside := [number for number in numbers if not 0 <= number < size]:
        raise PlanError(f"{name}: {outside} are not from 0 to {size - 1}.")
    return numbers


def _first_difference(mine: tuple, theirs: tuple, what: str) -> tuple[str, str]:
    if len(mine) != len(theirs):
        ends = what == "steps"  # there is one sigma more
        return f"{len(mine) - ends} {what}", f"{len(theirs) - ends} {what}"
    number = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    return f"{mine[number]} (number {number})", f"{theirs[number]} (number {number})"
