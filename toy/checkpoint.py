"""Where a training stands, and the file that the next slice goes on from."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as serialize

from dfa2_jax.io.atomic import replacing
from toy.optimizer import Weights, fresh_weights
from toy.stages import Part, Stage
from toy.task import Task


class State(NamedTuple):
    """Both phases' weights, by the names that a `Task` gives them."""

    vae: Weights
    flow: Weights
    latents: Any
    """Mean and standard deviation of the autoencoder's latents; (0, 0) while it trains."""


@dataclass
class Progress:
    """What is done, in the unit of the total."""

    unit: str
    seed: int
    total: float
    spent: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)
    """By stage."""
    images: int = 0
    seconds: float = 0.0
    slices: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)

    def note(self, stage: Stage, part: Part, loss: float, step: int, seconds: float) -> dict[str, Any]:
        """One call of a program, as the log keeps it."""
        self.calls[stage.name] = self.calls.get(stage.name, 0) + 1
        self.images += part.steps * part.batch
        self.spent += seconds if self.unit == "seconds" else part.steps
        entry = {"stage": stage.name, "pixels": part.pixels, "t5": part.t5_length, "loss": round(loss, 5)}
        entry |= {"spent": round(self.spent, 2), "step": step, "ms": round(1000 * seconds / part.steps, 2)}
        self.log.append(entry)
        return entry


def named(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path; of a network's parameter, the path that the library's rules give it."""
    names = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path]
        names[".".join(part for part in parts if part != "value")] = leaf
    return names


def save(folder: Path, state: State, progress: Progress) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(leaf) for name, leaf in named(state).items()}
    with replacing(folder / "checkpoint.safetensors") as file:
        file.write(serialize(arrays, metadata={"progress": json.dumps(asdict(progress))}))


def restore(folder: Path, state: State) -> tuple[State, Progress] | None:
    """What `save` wrote, in the structure of `state`; None if it wrote nothing."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "numpy") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
        leaves = [file.get_tensor(name) for name in named(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), progress


def begin(task: Task, out: Path, unit: str, total: float, seed: int) -> tuple[State, Progress]:
    """The checkpoint in `out`, or a fresh start, as arrays of the host."""
    vae, flow = (fresh_weights(names, seed, task.configs) for names in (task.vae, task.flow))
    fresh = State(vae, flow, np.zeros(2, np.float32))
    state, progress = restore(out, fresh) or (fresh, Progress(unit, seed, total))
    if (progress.unit, progress.seed) != (unit, seed):
        raise ValueError(
            f"The checkpoint in {out} counts {progress.unit} from seed {progress.seed}, not {unit} from {seed}."
        )
    progress.total, progress.slices = total, progress.slices + (progress.spent < total)
    return state, progress
