"""Weights of opened checkpoints, compared; and converted folders, changed."""

import json

import numpy as np
from flax import nnx

from dfa2_jax.io.digest import digest_of


def leaves(checkpoint, component, dtype=None):
    return dict(nnx.to_flat_state(nnx.state(checkpoint.load(component, dtype))))


def assert_equal_weights(a, b, component, dtype=None):
    ours, theirs = leaves(a, component, dtype), leaves(b, component, dtype)
    assert ours.keys() == theirs.keys() and ours
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(leaf[...], theirs[path][...], err_msg=str(path))


def edit_config(folder, change, *, signed=True):
    """config.json after `change(config)`, with the digest made good or as it was."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    if signed and config.pop("digest", None):
        config["digest"] = digest_of(config)
    (folder / "config.json").write_text(json.dumps(config))
