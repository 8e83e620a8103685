"""Weights of opened checkpoints, compared."""

import numpy as np
from flax import nnx


def leaves(checkpoint, component, dtype=None):
    return dict(nnx.to_flat_state(nnx.state(checkpoint.load(component, dtype))))


def assert_equal_weights(a, b, component, dtype=None):
    ours, theirs = leaves(a, component, dtype), leaves(b, component, dtype)
    assert ours.keys() == theirs.keys() and ours
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(leaf[...], theirs[path][...], err_msg=str(path))
