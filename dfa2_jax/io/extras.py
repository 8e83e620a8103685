"""Packages that only an extra brings: they are imported where they are used."""

from importlib import import_module
from typing import Any


class MissingExtra(ValueError):
    """A package is not installed. The message names the extra that brings it."""


def need(module: str, feature: str, extra: str) -> Any:
    """Import a module that `feature` cannot do without.

    Raises:
        MissingExtra: it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(f"{feature} needs {package}: pip install 'dfa2-jax[{extra}]' ({error!s:.200}).") from error
