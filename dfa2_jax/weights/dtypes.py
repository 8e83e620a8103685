"""Types of weights by name; imports no JAX, so that a command line can list them."""

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
"""What a checkpoint may hold, and what a component may be loaded in."""
