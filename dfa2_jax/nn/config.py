"""Configs from JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def config_from_json(cls: type[Config], json: Mapping[str, Any]) -> Config:
    """Fill the dataclass `cls` from a parsed config.json: other keys are ignored, lists become tuples.

    Raises ValueError where a field without a default is missing.
    """
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in json]
    if missing:
        raise ValueError(
            f"config.json of a {cls.__name__.removesuffix('Config')} lacks {missing}; it has {sorted(json)}"
        )
    values = {f.name: json[f.name] for f in fields if f.name in json}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
