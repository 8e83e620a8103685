"""What a training leaves: its files, and those opened as a checkpoint, with neither torch nor diffusers."""

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save

from dfa2_jax.families.sd3.family import SD3
from dfa2_jax.io.atomic import replacing, write_whole
from dfa2_jax.weights.checkpoint import Checkpoint
from dfa2_jax.weights.leaf import Block, Leaf
from dfa2_jax.weights.spec import class_names
from toy import model
from toy.checkpoint import Progress, State, named

RESULT_BYTES = 15 * 2**20
"""The size of one file of a result, at most. The file then passes where files may have 16 MB."""


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every parameter as "network.path", and "latents": their mean and standard deviation."""
    files = sorted(folder.glob("weights-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no weights-*.safetensors: `python -m toy.train --result` writes them.")
    return {name: array for file in files for name, array in load_file(file).items()}


def read_result(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a result of images, with SD3's position table."""
    return read_arrays(folder) | {"transformer.pos_embed": model.position_table()}


def config(name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A network's config.json; the autoencoder's says how its latents are spread."""
    fields = dict(model.configs()[name][1])
    if name == "vae":
        mean, deviation = (float(x) for x in arrays["latents"])
        fields |= {"shift_factor": round(mean, 4), "scaling_factor": round(1 / deviation, 4)}
    return fields


class ResultCheckpoint(Checkpoint):
    """What `--result` wrote.

    Args:
        arrays: of `read_result`.
        configs: the scheduler's, and each network's.
        write_tokenizer: writes the tokenizer of a name into a folder of that name in a folder.
    """

    def __init__(
        self,
        folder: Path,
        family: type[Any],
        arrays: dict[str, np.ndarray],
        configs: dict[str, dict[str, Any]],
        write_tokenizer: Callable[[Path, str], Path],
    ):
        self._arrays, self._write_tokenizer = arrays, write_tokenizer
        self._tokenizers = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._tokenizers)
        super().__init__(folder, family, {name: names[0] for name, names in class_names(family).items()}, configs)

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

    def tokenizer_folder(self, name: str) -> Path:
        """A result holds no tokenizer: its files are written where they live as long as the checkpoint."""
        written = self._tokenizers / name
        return written if written.exists() else self._write_tokenizer(self._tokenizers, name)


def open_result(folder: Path) -> ResultCheckpoint:
    """A folder that `toy.train --result` wrote."""
    arrays = read_result(folder)
    configs = {name: config(name, arrays) for name in model.configs()} | {"scheduler": model.SCHEDULER}
    return ResultCheckpoint(folder, SD3, arrays, configs, model.write_tokenizer)


def write_result(folder: Path, state: State, progress: Progress) -> None:
    """The running averages in files of at most `RESULT_BYTES`, and the log."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(leaf) for name, leaf in named({**state.vae.ema, **state.flow.ema}).items()}
    files: list[dict[str, np.ndarray]] = [{"latents": np.asarray(state.latents)}]
    for name, array in arrays.items():
        if sum(kept.nbytes for kept in files[-1].values()) + array.nbytes > RESULT_BYTES:
            files.append({})
        files[-1][name] = array
    for number, content in enumerate(files):
        with replacing(folder / f"weights-{number}.safetensors") as file:
            file.write(save(content))
    steps = {phase: int(getattr(state, phase).step) for phase in ("vae", "flow")}
    device = jax.devices()[0].device_kind
    log = asdict(progress) | {"steps": steps, "device": device, "devices": jax.device_count()}
    write_whole(folder / "log.json", json.dumps(log, indent=1) + "\n")
    write_whole(folder / "summary.json", json.dumps(in_short(log), indent=1) + "\n")


def in_short(log: dict[str, Any]) -> dict[str, Any]:
    """A log whose calls are gathered by the program that they ran: median time, first loss, mean of the last 5 %."""
    programs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for call in log["log"]:
        programs.setdefault((call["stage"], call["pixels"], call["t5"]), []).append(call)
    summaries = [
        dict(zip(("stage", "pixels", "t5"), name, strict=True))
        | {"calls": len(calls), "ms": float(np.median([call["ms"] for call in calls])), "first_loss": calls[0]["loss"]}
        | {"last_loss": round(float(np.mean([call["loss"] for call in calls[-max(1, len(calls) // 20) :]])), 5)}
        for name, calls in programs.items()
    ]
    return {name: value for name, value in log.items() if name != "log"} | {"programs": summaries}
