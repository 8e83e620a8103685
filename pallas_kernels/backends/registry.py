"""Which backend has which name. A backend is imported when it is first asked for."""

from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module

from pallas_kernels.backends.base import Backend, Device, Problem

BACKENDS: dict[str, str | Backend] = {
    "reference": "pallas_kernels.backends.reference:Reference",
    "blockwise": "pallas_kernels.backends.blockwise:Blockwise",
    "triton": "pallas_kernels.backends.triton.backend:Triton",
    "mosaic": "pallas_kernels.backends.mosaic.backend:Mosaic",
    "jax_triton": "pallas_kernels.backends.jax_triton.backend:JaxTriton",
    "cudnn": "pallas_kernels.backends.cudnn:Cudnn",
}
"""A backend, or the class that makes it as "module:class": each works where another is missing."""


def register(name: str, backend: Backend) -> None:
    """Make a backend what `implementation=name` means, in place of the one that had the name, if any.

    Raises:
        ValueError: it does not satisfy the protocol.
    """
    if not isinstance(backend, Backend):
        raise ValueError(
            f"{name!r} must have `interpretable` and `lacks`, as backends.base.Backend, got {backend!r:.100}."
        )
    BACKENDS[name] = backend


def backend_named(name: str) -> Backend:
    """The backend.

    Raises:
        ValueError: no backend has this name.
        ImportError: its file, or what that needs, is missing.
    """
    if name not in BACKENDS:
        nearest = get_close_matches(str(name), BACKENDS, 1)
        advice = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"implementation={name!r} is not one of {tuple(BACKENDS)}.{advice}")
    backend = BACKENDS[name]
    if isinstance(backend, str):
        module, _, made_by = backend.partition(":")
        backend = BACKENDS[name] = getattr(import_module(module), made_by)()
    return backend


def lacks(name: str, problem: Problem, device: Device) -> str | None:
    """As `Backend.lacks`; a backend that cannot be imported lacks itself."""
    try:
        backend = backend_named(name)
    except ImportError as error:
        return f"the backend {name!r} cannot be imported: {error}"
    return backend.lacks(problem, device)


def interpretable_names() -> tuple[str, ...]:
    """Names of the backends that take `interpret=True`, of those that can be imported."""
    names = []
    for name in BACKENDS:
        with suppress(ImportError):
            names += [name] * backend_named(name).interpretable
    return tuple(names)
