"""A kernel in Triton itself, which jax-triton launches."""
