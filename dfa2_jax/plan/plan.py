"""A plan: the method of every step, attention layer and head, as data that a person can read (arXiv 2503.22796)."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Int, UInt8
from pydantic import Field, ValidationError

from dfa2_jax.io.atomic import replacing
from dfa2_jax.io.errors import CheckpointError, read_json
from dfa2_jax.plan.setting import CalibrationRecord, Record, Setting
from pallas_kernels.layout import CACHED, FULL
from pallas_kernels.mask import count_tiles, kept_pairs

MAX_BYTES = 20_000_000  # FLUX.1-dev at 50 steps: 0.2 MB
VERSION = 1


class PlanError(ValueError):
    """A plan cannot be read, or does not fit. The message names the field, both values and the way out."""


@dataclass(frozen=True)
class Method:
    """What a head does: "full", "cached" (its output of the step before), or "arrow(1/f)"."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in ("full", "cached") and not self._fraction:
            raise PlanError(f"{self.name!r:.100} is not a method: full, cached, or arrow(1/f) with f from 1 to 99999.")

    @classmethod
    def arrow(cls, fraction: int) -> "Method":
        """A band as wide as 1/fraction of the visual tokens, half of it on each side."""
        return cls(f"arrow(1/{fraction})")

    @property
    def _fraction(self) -> int:
        number = self.name.removeprefix("arrow(1/").removesuffix(")")
        exact = self.name == f"arrow(1/{number})" and number.isascii() and number.isdecimal() and len(number) < 6
        return int(number) if exact and not number.startswith("0") else 0

    def half_window(self, num_visual: int) -> int:
        """Visual tokens kept on each side of the diagonal; `FULL` or `CACHED`."""
        if not self._fraction:
            return FULL if self.name == "full" else CACHED
        return max(1, num_visual // (2 * self._fraction))

    def __str__(self) -> str:
        return self.name


FULL_METHOD, CACHED_METHOD = Method("full"), Method("cached")


class _File(Record):
    """A plan's JSON. Methods have one character each; a step gives every layer a string of them, one for each head."""

    format: Literal["dfa2-plan"]
    version: Literal[1]
    digest: str
    edited: bool
    setting: Setting
    calibration: CalibrationRecord | None
    methods: Annotated[dict[Annotated[str, Field(min_length=1, max_length=1)], str], Field(min_length=1, max_length=64)]
    steps: Annotated[list[dict[str, str]], Field(max_length=1000)]


@dataclass(frozen=True, eq=False)
class Plan:
    """The method of every head at every step of one kind of sampling call.

    Attributes:
        choices: [steps, layers, heads], numbers of `methods`; full at step 0.
        edited: changed since it was calibrated.

    Raises:
        PlanError: choices do not fit the setting, or the first step is not full.
    """

    setting: Setting
    methods: tuple[Method, ...]
    choices: UInt8[np.ndarray, "steps layers heads"]
    calibration: CalibrationRecord | None = None
    edited: bool = False

    def __post_init__(self) -> None:
        setting = self.setting
        shape = (setting.num_inference_steps, len(setting.layers), setting.num_heads)
        if self.choices.shape != shape:
            raise PlanError(
                f"choices are {list(self.choices.shape)}, but the setting has steps, layers, heads {shape}."
            )
        _letters(self.methods)
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def full(cls, setting: Setting) -> "Plan":
        """Every head in full: what others are made from by `with_method`."""
        shape = setting.num_inference_steps, len(setting.layers), setting.num_heads
        return cls(setting, (FULL_METHOD,), np.zeros(shape, np.uint8))

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

    def density(self, tiles: tuple[int, int] | None = None) -> float:
        """The kept share of all query-key pairs, or the visited share of tiles of these many queries and keys."""
        kept, total, windows = 0, 0, self.half_windows()
        for number, layer in enumerate(self.setting.layers):
            found, counts = np.unique(windows[:, number], return_counts=True)
            if tiles is None:
                one, every = kept_pairs(found, layer.layout), layer.layout.length**2
            else:
                one, _, every = count_tiles(found, layer.layout, *tiles)
            kept, total = kept + int((one * counts).sum()), total + int(every) * int(counts.sum())
        return kept / total

    def with_method(self, steps: Any, layers: Any, heads: Any, method: Method | str) -> "Plan":
        """With another method for some heads. Steps, layers and heads are a number, a slice, a list, or None for all;
        layers also names.

        Raises:
            PlanError: there is no such step, layer or head, or step 0 would not be full.
        """
        method = Method(method) if isinstance(method, str) else method
        methods = self.methods if method in self.methods else (*self.methods, method)
        names = [layer.name for layer in self.setting.layers]
        chosen = [
            _select(name, selector, size)
            for name, selector, size in zip(
                ("steps", "layers", "heads"), (steps, _numbers(layers, names), heads), self.choices.shape, strict=True
            )
        ]
        choices = self.choices.copy()
        choices[np.ix_(*chosen)] = methods.index(method)
        return replace(self, methods=methods, choices=choices, edited=True)

    def for_weights(self, pipeline: Any) -> "Plan":
        """For other weights of the same model, a fine-tune: whether its heads behave alike is the caller's to know.

        Args:
            pipeline: a `Pipeline`, or the fingerprint of its weights.
        """
        weights = pipeline if isinstance(pipeline, str) else pipeline.fingerprint
        return replace(self, setting=self.setting.model_copy(update={"weights": weights}), edited=True)

    def check(self, setting: Setting) -> None:
        """Whether the plan is for this sampling call.

        Raises:
            PlanError: names every field that differs, with both values.
        """
        faults = []
        for name, advice in ADVICE.items():
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
        content = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(content.encode()).hexdigest()

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON, whole or not at all."""
        with replacing(Path(path)) as file:
            file.write(_pretty({"format": "dfa2-plan", "version": VERSION, "digest": self.digest} | self._content()))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Plan":
        """Read a plan, and check all that the file alone can show.

        Raises:
            PlanError: what is wrong with which field.
        """
        plan, digest = _read(Path(path))
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
        plan = replace(_read(Path(path))[0], edited=True)
        plan.save(path)
        return plan

    def _content(self) -> dict[str, Any]:
        letters = _letters(self.methods)
        names, table = [layer.name for layer in self.setting.layers], np.array(letters)
        steps = [dict(zip(names, map("".join, table[step]), strict=True)) for step in self.choices]
        return {
            "edited": self.edited,
            "setting": self.setting.model_dump(mode="json"),
            "calibration": self.calibration and self.calibration.model_dump(mode="json"),
            "methods": dict(zip(letters, map(str, self.methods), strict=True)),
            "steps": steps,
        }


ADVICE = {
    "pipeline_class": "a plan serves one kind of model.",
    "weights": "plan.for_weights(pipeline) if these are a fine-tune of the same model, else calibrate anew.",
    "scheduler": "calibrate with this scheduler.",
    "sigmas": "leave num_inference_steps and sigmas to the plan, or calibrate with these.",
    "height": "leave it to the plan, or calibrate at this size.",
    "width": "leave it to the plan, or calibrate at this size.",
    "doubled_batch": "calibrate with this kind of guidance.",
    "num_heads": "a plan serves one model.",
    "layers": "leave max_sequence_length to the plan, or calibrate with this one.",
}
"""What to do where a plan and a call differ."""


def schema() -> dict[str, Any]:
    """JSON Schema of a plan's file: plan.schema.json is this."""
    return _File.model_json_schema()


def _read(path: Path) -> tuple[Plan, str]:
    """A plan, and the digest that its file says."""
    try:
        content = read_json(path, MAX_BYTES)
    except CheckpointError as error:
        raise PlanError(str(error)) from error
    newer = content.get("version")
    if content.get("format") == "dfa2-plan" and isinstance(newer, int) and newer > VERSION:
        raise PlanError(f"{path}: version is {newer}, made by a newer dfa2_jax; this one reads version {VERSION}.")
    try:
        file = _File.model_validate(content)
        return _plan(file), file.digest
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc'])):.200}: {one['msg']:.200}" for one in error.errors()[:8]]
        raise PlanError(f"{path} is not a plan.\n" + "\n".join(faults)) from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except RecursionError as error:
        raise PlanError(f"{path} is not a plan: it is nested too deeply.") from error


def _plan(file: _File) -> Plan:
    setting, names = file.setting, [layer.name for layer in file.setting.layers]
    if len({*names}) < len(names):
        raise PlanError(f"setting.layers: {max(names, key=names.count)!r} is there twice.")
    if len({*file.methods.values()}) < len(file.methods):
        raise PlanError(f"methods: one is there twice: {file.methods}.")
    methods = tuple(Method(name) for name in file.methods.values())
    if _letters(methods) != list(file.methods):
        raise PlanError(f"methods: {list(file.methods)} stand for {[*map(str, methods)]}, not {_letters(methods)}.")
    if len(file.steps) != setting.num_inference_steps:
        raise PlanError(f"steps: there are {len(file.steps)}, but setting.sigmas has {setting.num_inference_steps}.")
    number = {letter: i for i, letter in enumerate(file.methods)}
    choices = np.zeros((len(file.steps), len(names), setting.num_heads), np.uint8)
    for i, step in enumerate(file.steps):
        if list(step) != names:
            raise PlanError(f"steps[{i}]: layers are not those of setting.layers in their order: {list(step)!s:.200}.")
        for j, (name, heads) in enumerate(step.items()):
            if len(heads) != setting.num_heads:
                raise PlanError(
                    f"steps[{i}].{name} has {len(heads)} heads, but setting.num_heads is {setting.num_heads}."
                )
            if unknown := {*heads} - {*number}:
                raise PlanError(
                    f"steps[{i}].{name} has {sorted(unknown)}, which methods {list(number)} do not explain."
                )
            choices[i, j] = [number[letter] for letter in heads]
    if file.calibration is not None:
        shape = [len(row) for row in file.calibration.errors]
        if shape != [len(names)] * len(file.steps):
            raise PlanError(f"calibration.errors must be {len(file.steps)} rows of {len(names)}, got {shape!s:.200}.")
    return Plan(setting, methods, choices, file.calibration, file.edited)


ARROW_LETTERS = "abdeghijklmnopqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def _letters(methods: tuple[Method, ...]) -> list[str]:
    """f, c, and for arrows a, b, d, ..."""
    known = {"full": "f", "cached": "c"}
    if (count := sum(method.name not in known for method in methods)) > len(ARROW_LETTERS):
        raise PlanError(f"methods: there are {count} arrows, but letters for {len(ARROW_LETTERS)}: take fewer.")
    arrows = iter(ARROW_LETTERS)
    return [known.get(method.name) or next(arrows) for method in methods]


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
    numbers = [int(one) for one in (selector if isinstance(selector, Iterable) else [selector])]
    if outside := [one for one in numbers if not 0 <= one < size]:
        raise PlanError(f"{name}: {outside} are not from 0 to {size - 1}.")
    return numbers


def _first_difference(mine: tuple, theirs: tuple, what: str) -> tuple[str, str]:
    if len(mine) != len(theirs):
        ends = what == "steps"  # there is one sigma more
        return f"{len(mine) - ends} {what}", f"{len(theirs) - ends} {what}"
    number = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    return f"{mine[number]} (number {number})", f"{theirs[number]} (number {number})"


def _pretty(content: dict[str, Any]) -> bytes:
    """One line for each layer of a step, and for each list of numbers."""

    def write(value: Any, indent: str) -> str:
        deeper = indent + " "
        if isinstance(value, dict) and value:
            lines = [f"{deeper}{json.dumps(key)}: {write(one, deeper)}" for key, one in value.items()]
            return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
        if isinstance(value, list) and any(isinstance(one, list | dict) for one in value):
            return "[\n" + ",\n".join(deeper + write(one, deeper) for one in value) + f"\n{indent}]"
        return json.dumps(value, allow_nan=False)

    return (write(content, "") + "\n").encode()
