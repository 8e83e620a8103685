"""Names of arguments: a misspelt one is refused with the nearest that there is. Imports neither JAX nor NumPy."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

Values = TypeVar("Values")
Function = TypeVar("Function", bound=Callable[..., Any])


def natural(value: Any) -> Any:
    """As Python has it: NumPy's numbers are numbers, lists and arrays of them tuples."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(natural, value)) if isinstance(value, list) else value


def of_names(cls: type[Values], arguments: Mapping[str, Any]) -> Values:
    """`cls(**arguments)`.

    Raises:
        TypeError: `cls` lacks a name; the message holds the nearest one that it has.
    """
    check_names(cls.__name__, arguments, names_of(cls))
    return cls(**arguments)


def names_of(group: Any) -> list[str]:
    return [argument.name for argument in fields(group)]


ANSWERS = {
    "generator": "pass seed=, an int or one for each image: it draws the noise of torch.Generator().manual_seed(seed).",
    "torch_dtype": "pass dtype=.",
    "device": "weights go to JAX's default device, jax.devices()[0]; CUDA_VISIBLE_DEVICES chooses.",
    "device_map": "weights go to JAX's default device, jax.devices()[0]; CUDA_VISIBLE_DEVICES chooses.",
    "return_dict": "a call returns an Output, with images.",
}
"""Arguments of diffusers that have another form here."""


def check_names(owner: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuses names that `owner` lacks.

    Raises:
        TypeError: holds the nearest name.
    """
    for name in given:
        if name not in known:
            nearest = get_close_matches(name, known, 1)
            advice = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(known)}."
            advice = ANSWERS.get(name, advice)
            raise TypeError(f"{owner} has no argument {name!r}: {advice}")


def suggests_names(function: Function) -> Function:
    """The function, whose error for a misspelt argument names the nearest one.

    Stands below `@classmethod`, and above all that wraps the function in another signature.
    """
    known = [name for name in signature(function).parameters if name not in ("self", "cls")]
    owner = function.__qualname__.removesuffix(".__call__").replace("Loaded.", "Pipeline.")

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_names(owner, kwargs, known)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]
