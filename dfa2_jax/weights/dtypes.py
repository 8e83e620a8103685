"""Types of weights by name; imports no JAX, so that a command line can list them."""

from typing import Literal, get_args

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
"""What a checkpoint may hold, and what a component may be loaded in."""

Precision = Literal["float8", "int8", "int8_weights"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""What a transformer's blocks may multiply in, besides: 8-bit weights and activations, or weights alone."""


def as_precision(dtype: object) -> Precision | None:
    """The precision that a dtype names, if it names one."""
    return next((precision for precision in PRECISIONS if precision == dtype), None)


TEXT_ENCODER_DTYPES = (*FLOAT_DTYPES, "int8_weights")
"""What text encoders may be loaded in. T5's hidden activations vary too much in size for 8 bits."""

EIGHT_BITS = ("float8_e4m3fn", "int8")
"""Types of quantised weights in a converted folder."""
