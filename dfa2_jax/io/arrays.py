"""Arrays that a caller hands in."""

from typing import Any

import numpy as np


def host_array(name: str, value: Any) -> np.ndarray:
    """Numbers as NumPy has them: of a list, an array, or a torch tensor of any dtype, on any device, with or without
    a gradient.

    Raises:
        ValueError: they are no numbers, or not finite.
    """
    try:
        array = np.asarray(value.detach().cpu().float() if hasattr(value, "detach") else value)
        if array.dtype.kind in "bcmM":
            raise TypeError(f"it is {array.dtype}")
        with np.errstate(over="ignore"):  # float32 is what it becomes
            is_finite = np.isfinite(array.astype(np.float32)).all()
    except Exception as error:
        raise ValueError(f"{name}={value!r:.200} is no array of numbers: {error!s:.200}") from error
    if not is_finite:
        raise ValueError(f"{name} {list(array.shape)} holds numbers that are not finite: look at where it came from.")
    return array
