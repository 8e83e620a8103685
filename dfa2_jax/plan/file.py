"""A plan's file: JSON that a person can read and edit, its schema, and all that is checked when it is read."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field, ValidationError, model_validator

from dfa2_jax.io.digest import digest_of
from dfa2_jax.io.errors import CheckpointError, read_json
from dfa2_jax.plan.method import Method, PlanError, letters
from dfa2_jax.plan.setting import CalibrationRecord, Count, Number, Record, Setting, StepCalibration

MAX_BYTES = 20_000_000  # FLUX.1-dev at 50 steps: 0.2 MB
FORMAT, VERSION = "dfa2-plan", 2

Pair = Annotated[tuple[Number, Number], Field(strict=False)]
Choices = UInt8[np.ndarray, "nodes layers heads"]


class PlanFile(Record):
    """A plan's JSON. Methods have one letter each; a step gives every layer a string of them, one for each head.

    Version 2 has `nodes`, the steps at which the network runs, and an entry of `steps` for each. A plan of heads
    alone is written as version 1.
    """

    format: Literal["dfa2-plan"]
    version: Literal[1, 2]
    digest: str
    edited: bool
    setting: Setting
    calibration: CalibrationRecord | None
    methods: Annotated[dict[Annotated[str, Field(min_length=1, max_length=1)], str], Field(min_length=1, max_length=64)]
    steps: Annotated[list[dict[str, str]], Field(max_length=1000)]
    nodes: Annotated[tuple[Count, ...], Field(strict=False, min_length=1, max_length=1000)] | None = None
    coefficients: Annotated[tuple[Pair, ...], Field(strict=False, max_length=1000)] | None = None
    """By node: of its velocity and of the last node's."""
    step_calibration: StepCalibration | None = None

    @model_validator(mode="after")
    def _check_version(self) -> "PlanFile":
        if (self.nodes is None) != (self.coefficients is None):
            raise ValueError("nodes and coefficients: there is one without the other")
        if self.version != (needed := version_of(self.model_fields_set)):
            raise ValueError(f"version is {self.version}, but its fields are those of {needed}")
        return self

    def parse_methods(self) -> tuple[Method, ...]:
        """The methods, in the order of their numbers.

        Raises:
            PlanError: a name or a letter is wrong, or a method is there twice.
        """
        if len({*self.methods.values()}) < len(self.methods):
            raise PlanError(f"methods: one is there twice: {self.methods}.")
        methods = tuple(Method(name) for name in self.methods.values())
        if letters(methods) != list(self.methods):
            raise PlanError(f"methods: {list(self.methods)} stand for {[*map(str, methods)]}, not {letters(methods)}.")
        return methods

    def parse_steps(self) -> Choices:
        """The number of the method of every head.

        Raises:
            PlanError: steps, layers, heads or letters are not those of the setting and of the methods.
        """
        setting, names = self.setting, [layer.name for layer in self.setting.layers]
        if len({*names}) < len(names):
            raise PlanError(f"setting.layers: {max(names, key=names.count)!r} is there twice.")
        count, what = (
            (setting.num_inference_steps, "setting.sigmas has")
            if self.nodes is None
            else (len(self.nodes), "nodes are")
        )
        if len(self.steps) != count:
            raise PlanError(f"steps: there are {len(self.steps)}, but {what} {count}.")
        numbers = {letter: number for number, letter in enumerate(self.methods)}
        choices = np.zeros((len(self.steps), len(names), setting.num_heads), np.uint8)
        for i, step in enumerate(self.steps):
            if list(step) != names:
                raise PlanError(
                    f"steps[{i}]: layers are not those of setting.layers in their order: {list(step)!s:.200}."
                )
            for j, (name, heads) in enumerate(step.items()):
                field = f"steps[{i}].{name}"
                if len(heads) != setting.num_heads:
                    raise PlanError(f"{field} has {len(heads)} heads, but setting.num_heads is {setting.num_heads}.")
                if unknown := {*heads} - {*numbers}:
                    raise PlanError(f"{field} has {sorted(unknown)}, which methods {list(numbers)} do not explain.")
                choices[i, j] = [numbers[letter] for letter in heads]
        return choices

    def check_errors(self) -> None:
        """The errors of a calibration have the shape of its plan.

        Raises:
            PlanError: they have another.
        """
        if self.calibration is None:
            return
        sizes, layers = [len(errors) for errors in self.calibration.errors], len(self.setting.layers)
        if sizes != [layers] * len(self.steps):
            raise PlanError(f"calibration.errors must be {len(self.steps)} rows of {layers}, got {sizes!s:.200}.")


def version_of(fields: Collection[str]) -> int:
    """The least that has these fields."""
    return VERSION if {"nodes", "step_calibration"} & {*fields} else 1


def schema() -> dict[str, Any]:
    """JSON Schema of a plan's file: plan.schema.json is this."""
    return PlanFile.model_json_schema()


def read(path: Path) -> PlanFile:
    """A file whose fields have the right types; `blame_file` says what else may be wrong.

    Raises:
        PlanError: it cannot be read, is of a newer version, or a field is of another type.
    """
    try:
        content = read_json(path, MAX_BYTES)
    except CheckpointError as error:
        raise PlanError(str(error)) from error
    version = content.get("version")
    if content.get("format") == FORMAT and isinstance(version, int) and version > VERSION:
        raise PlanError(f"{path}: version is {version}, made by a newer dfa2_jax; this one reads up to {VERSION}.")
    try:
        return PlanFile.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])):.200}: {fault['msg']:.200}" for fault in error.errors()[:8]]
        raise PlanError(f"{path} is not a plan.\n" + "\n".join(faults)) from error
    except RecursionError as error:
        raise PlanError(f"{path} is not a plan: it is nested too deeply.") from error


@contextmanager
def blame_file(path: Path) -> Iterator[None]:
    """Errors of the code within are the file's: they name it."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def content_of(
    setting: Setting, methods: Sequence[Method], choices: Choices, calibration: CalibrationRecord | None, edited: bool
) -> dict[str, Any]:
    """What a file says of heads, beside format, version and digest."""
    names, table = [layer.name for layer in setting.layers], np.array(letters(methods))
    steps = [dict(zip(names, map("".join, table[step]), strict=True)) for step in choices]
    return {
        "edited": edited,
        "setting": setting.content(),
        "calibration": calibration and calibration.model_dump(mode="json", exclude_defaults=True),
        "methods": dict(zip(letters(methods), map(str, methods), strict=True)),
        "steps": steps,
    }


def written(content: dict[str, Any]) -> bytes:
    """The whole file: one line for each layer of a step, and for each list of numbers."""

    def write(value: Any, indent: str) -> str:
        deeper = indent + " "
        if isinstance(value, dict) and value:
            lines = [f"{deeper}{json.dumps(key)}: {write(part, deeper)}" for key, part in value.items()]
            return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
        if isinstance(value, list) and any(isinstance(part, list | dict) for part in value):
            return "[\n" + ",\n".join(deeper + write(part, deeper) for part in value) + f"\n{indent}]"
        return json.dumps(value, allow_nan=False)

    head = {"format": FORMAT, "version": version_of(content), "digest": digest_of(content)}
    return (write(head | content, "") + "\n").encode()
