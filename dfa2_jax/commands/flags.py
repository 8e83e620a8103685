"""Flags made of the fields of `dfa2_jax.options`. Imports no JAX."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields
from typing import Any, get_args, get_origin

ALIASES = {"dtype": ["--torch-dtype"]}
"""Flags that diffusers' users know by another name than ours."""
METAVARS = {int: "N", float: "X", str: "TEXT"}


def flagged(group: Any, names: Sequence[str] | None = None) -> Iterator[Field[Any]]:
    """The fields of an options class that have a flag; of all, or of those named."""
    for argument in fields(group):
        if argument.metadata["flag"] and (names is None or argument.name in names):
            yield argument


def add_flags(parser: argparse.ArgumentParser, group: Any, names: Sequence[str] | None = None) -> None:
    """A flag for each field that has one. What its metadata leaves open follows from name, type and default.

    A field whose flag has another name takes diffusers' name, the field's own, as well.
    """
    for argument in flagged(group, names):
        flag, default, words = argument.metadata["flag"], argument.default, argument.metadata["words"]
        kind = next((kind for kind in (bool, int, float) if kind in _kinds(argument.type)), str)
        text = argument.metadata["description"].replace("None:", "default:").replace("`", "")
        follows: dict[str, Any] = {"dest": argument.name, "default": default, "help": text}
        if kind is bool:
            follows["action"] = "store_false" if default else "store_true"
        else:
            follows |= {"type": kind} | ({} if "choices" in words else {"metavar": METAVARS[kind]})
        words = follows | words
        if default is not None and kind is not bool:
            words["help"] += f" (default: {default})"
        own_name = f"--{argument.name.replace('_', '-')}"
        flags = [own_name] if flag is True else [flag] if kind is bool else [flag, own_name]
        parser.add_argument(*flags, *ALIASES.get(argument.name, ()), **words)


def _kinds(annotation: Any) -> Iterator[Any]:
    """A type, and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def given(args: argparse.Namespace, group: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The options of a group as their types have them: a list of one is that one, where the type is not only a list."""
    options = {}
    for argument in flagged(group, names):
        value, kinds = getattr(args, argument.name), {*_kinds(argument.type)}
        if isinstance(value, list):
            if any(get_origin(kind) is tuple for kind in kinds):
                value = tuple(value)
            elif len(value) == 1 and type(value[0]) in get_args(argument.type):
                value = value[0]
        options[argument.name] = value
    return options
