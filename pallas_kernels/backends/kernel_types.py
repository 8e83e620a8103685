"""Types of what a kernel works on."""

from typing import Any

from jaxtyping import Array, Bool, Int

Ref = Any
"""Memory that a kernel reads or writes. JAX has several classes for it, and those of slices are private."""

Scalar = Int[Array, ""] | int
"""A traced number, or one that is known."""

Flag = Bool[Array, ""] | bool
