"""What a training leaves, opened as a checkpoint: the pipeline samples from it with neither torch nor diffusers."""

import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from dfa2_jax.encoders.tokenizers import Tokenizer
from dfa2_jax.weights.checkpoint import Block, Checkpoint, Leaf
from toy import toy


def read_result(folder: Path) -> dict[str, np.ndarray]:
    """Every parameter as "network.path", SD3's position table, and "latents": their mean and standard deviation."""
    files = sorted(folder.glob("weights-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no weights-*.safetensors: `python -m toy.train --result` writes them.")
    arrays = {name: array for file in files for name, array in load_file(file).items()}
    return arrays | {"transformer.pos_embed": toy.position_table()}


def config(name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A network's config.json; the autoencoder's says how its latents are spread."""
    found = dict(toy.configs()[name][1])
    if name == "vae":
        mean, deviation = (float(x) for x in arrays["latents"])
        found |= {"shift_factor": round(mean, 4), "scaling_factor": round(1 / deviation, 4)}
    return found


class ResultCheckpoint(Checkpoint):
    """A folder that `toy.train --result` wrote."""

    def __init__(self, folder: Path):
        self._arrays = read_result(folder)
        classes = {name: class_name for name, (class_name, _) in toy.configs().items()}
        configs = {name: config(name, self._arrays) for name in classes} | {"scheduler": toy.SCHEDULER}
        classes |= {"scheduler": "FlowMatchEulerDiscreteScheduler"}
        super().__init__(folder, "StableDiffusion3Pipeline", classes, configs)

    @property
    def fingerprint(self) -> str:
        return "unsigned"

    def stored_dtype(self, component: str) -> np.dtype:
        return jnp.dtype("float32")

    def leaves(self, component: str) -> dict[tuple[Any, ...], Leaf]:
        leaves = {}
        for path, variable in nnx.to_flat_state(nnx.state(self.abstract(component, jnp.float32))):
            name = f"{component}.{'.'.join(map(str, path))}"
            array = self._arrays[name]
            if array.shape != variable.shape:
                raise ValueError(f"{name} is {array.shape}, expected {variable.shape}.")
            leaves[path] = Leaf(array.shape, array.dtype, [Block(name, 0, lambda array=array: array)])
        return leaves

    def tokenizer(self, name: str) -> Tokenizer:
        if name == "tokenizer_3":
            return toy.t5_tokenizer()
        with tempfile.TemporaryDirectory() as folder:
            return toy.clip_tokenizer(Path(folder), name)
