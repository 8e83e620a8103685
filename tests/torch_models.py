"""Torch models with every parameter redrawn, their weights in NNX modules, and relative errors."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx


def redraw(model: torch.nn.Module, scale: float = 0.1) -> torch.nn.Module:
    """Normal parameters from a seed, norm weights around 1: initial zero biases and equal norms hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + centre)
    return model.eval()


def load(make: Callable[[], nnx.Module], source: torch.nn.Module, rename: Callable[[str], str]) -> Any:
    """The module that `make` builds, with `source`'s parameters: `rename` gives each one's path, `#3` a row of a stack.

    Every parameter is filled, with its shape. Nothing is initialised first, which for a VAE takes 10 s of compilation.
    """
    found: dict[str, Any] = {}
    for name, parameter in source.named_parameters():
        path, value = rename(name), parameter.detach().float().numpy()
        if path.endswith("kernel"):
            path = path if value.ndim == 4 else path.replace("kernel", "weight.kernel")  # a linear layer holds a weight
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if row := re.search(r"\.#(\d+)", path):
            found.setdefault(path.replace(row.group(0), ""), []).append((int(row.group(1)), value))
        else:
            found[path] = value
    graph, state = nnx.split(nnx.eval_shape(make))
    targets = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    assert set(found) == set(targets), (sorted(set(found) - set(targets)), sorted(set(targets) - set(found)))
    for path, leaf in targets.items():
        value = found[path]
        value = np.stack([v for _, v in sorted(value, key=lambda kv: kv[0])]) if isinstance(value, list) else value
        assert value.shape == leaf.shape, (path, value.shape, leaf.shape)
        leaf.set_value(jnp.asarray(value, leaf.dtype))
    return nnx.merge(graph, state)


def numpy(x: Any) -> np.ndarray:
    return x.detach().float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32)


def relative_error(ours: Any, reference: Any) -> float:
    """Relative L2 distance of `ours` from `reference`."""
    ours, reference = numpy(ours), numpy(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
