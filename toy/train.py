"""Train the model in the box: the autoencoder first, then the transformer with its text encoders.

    python -m toy.train --out build/train --seconds 560 --total-seconds 1525 --result build/result

does one slice and stops; the same command again goes on from the last checkpoint. All work of a call (drawing scenes,
encoding them, noise, the optimizer's steps) is one program on the device. The learning rate and the changes of stage
follow the share of the total that is spent. So a faster machine makes more steps in the same time.
Same machine, same steps (`--total-steps` in place of `--total-seconds`): same weights, bit for bit on CPU.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from toy import model
from toy.autoencoder import latent_statistics, vae_loss
from toy.checkpoint import Progress, State, begin, save
from toy.data import tables
from toy.flow import best_attention, flow_loss
from toy.networks import Setup
from toy.optimizer import WARM_UP
from toy.programs import Programs
from toy.result import write_result
from toy.stages import PRESETS, Part, Stage, stage_at
from toy.task import Task

IMAGES = Task(
    vae=("vae",),
    flow=("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
    configs=model.configs,
    tables=tables,
    vae_loss=vae_loss,
    flow_loss=flow_loss,
    statistics=latent_statistics,
)


Presets = Mapping[str, Callable[[], tuple[Stage, ...]]]


class Slice:
    """The state of a training, what it trains on and its programs, on all devices."""

    def __init__(self, stages: tuple[Stage, ...], setup: Setup, state: State, progress: Progress):
        mesh = setup.mesh
        self.everywhere = jax.devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
        autoencoder = jax.tree.map(np.copy, state.vae.ema["vae"])  # the state is given away
        data = setup.task.tables() | {"vae": autoencoder, "latents": state.latents}
        self.state, self.data = jax.device_put((state, data), self.everywhere)
        self.stages, self.setup, self.progress = stages, setup, progress
        self.programs, self.key = Programs(setup, stages, self.state, self.data), jax.random.key(progress.seed)

    def freeze_autoencoder(self, part: Part) -> None:
        """The transformer trains on the autoencoder's running average and the statistics of its latents."""
        autoencoder = self.state.vae.ema["vae"]
        statistics = self.setup.task.statistics(self.setup, part, autoencoder, self.data, self.key)
        self.state = self.state._replace(latents=jax.device_put(statistics, self.everywhere))
        self.data = self.data | {"vae": autoencoder, "latents": self.state.latents}

    def advance(self) -> tuple[dict[str, Any], float]:
        """One call of a program: what the log keeps of it, and its seconds."""
        progress = self.progress
        stage, rate = stage_at(self.stages, progress.spent / progress.total)
        self.programs.prepare(stage)
        part = self.programs.choose(stage, progress.calls.get(stage.name, 0), patient=progress.unit == "steps")
        if part.phase == "flow" and not float(self.state.latents[1]):
            self.freeze_autoencoder(part)
        program, started = self.programs[part], time.monotonic()
        rate_array = jax.device_put(np.float32(rate), self.everywhere)
        key = jax.random.fold_in(self.key, part.phase == "flow")
        weights, loss = program(getattr(self.state, part.phase), self.data, key, rate_array)
        self.state = self.state._replace(**{part.phase: weights})
        loss = float(loss)  # waits
        seconds = time.monotonic() - started
        return progress.note(stage, part, loss, int(weights.step), seconds), seconds


def train(
    stages: tuple[Stage, ...],
    out: Path,
    *,
    unit: str,
    total: float,
    task: Task = IMAGES,
    amount: float = math.inf,
    dtype: Any = jnp.float32,
    seed: int = 0,
    warm_up: int = WARM_UP,
    save_every: float = 60.0,
    quiet: bool = False,
) -> tuple[State, Progress]:
    """One slice from the checkpoint in `out`, or from scratch.

    Args:
        unit: of `total`: "steps", or "seconds" that the device trains; compiling does not count.
        amount: of this slice: steps, or seconds by the clock.
    """
    started = last_saved = time.monotonic()
    mesh = Mesh(np.array(jax.devices()), ("batch",)) if jax.device_count() > 1 else None
    setup = Setup(task, dtype, best_attention(dtype), mesh, warm_up)
    state, progress = begin(task, out, unit, total, seed)
    already, earlier, last_call = progress.spent, progress.seconds, 0.0
    current = Slice(stages, setup, state, progress)

    def unfinished() -> bool:
        if unit == "steps":
            return progress.spent < min(total, already + amount)
        return progress.spent + last_call < total and time.monotonic() - started + last_call < amount

    bar = tqdm(total=round(total), initial=round(already), unit=unit[:-1], disable=quiet, mininterval=5)
    while unfinished():
        entry, last_call = current.advance()
        progress.seconds = earlier + time.monotonic() - started
        if not math.isfinite(entry["loss"]):
            raise FloatingPointError(f"The loss is {entry['loss']} at {entry}: the last checkpoint in {out} is good.")
        shown = f"{entry['stage']}, {entry['pixels']} px, loss {entry['loss']:.4f}, {entry['ms']} ms"
        bar.set_postfix_str(shown, refresh=False)
        bar.update(round(progress.spent) - bar.n)
        if time.monotonic() - last_saved > save_every:
            save(out, current.state, progress)
            last_saved = time.monotonic()
    bar.close()
    current.programs.close()
    save(out, current.state, progress)
    return current.state, progress


def run(task: Task, presets: Presets, *, about: str | None, out: str, total: float) -> None:
    """The command line of a training; `out` and `total` are its defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out), help="checkpoint of the training")
    parser.add_argument("--result", type=Path, help="where to write the weights and the log at the end of the slice")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of this slice, by the clock")
    parser.add_argument("--total-seconds", type=float, default=total, help="of all slices, less compilation")
    parser.add_argument("--total-steps", type=int, help="count steps, not seconds")
    parser.add_argument("--preset", choices=presets, help="batch sizes; by default those of the device")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    stages = presets[args.preset or ("gpu" if gpu else "cpu")]()
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(args.out / "xla"))
    steps = args.total_steps
    state, progress = train(
        stages,
        args.out,
        task=task,
        unit="steps" if steps else "seconds",
        total=steps or args.total_seconds,
        amount=math.inf if steps else args.seconds,
        dtype=jnp.bfloat16 if gpu else jnp.float32,
        seed=args.seed,
    )
    if args.result:
        write_result(args.result, state, progress)
    print(json.dumps(progress.log[-1:] + [{"spent": progress.spent, "of": progress.total, "images": progress.images}]))


if __name__ == "__main__":
    run(IMAGES, PRESETS, about=__doc__, out="build/train", total=1525)
