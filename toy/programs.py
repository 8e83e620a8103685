"""Programs of several steps each, compiled while others run."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from toy.checkpoint import State
from toy.networks import Setup
from toy.optimizer import Weights, update
from toy.stages import Part, Stage

GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""cuBLAS's own choice of kernels. H100, 128 pixels: 54 ms a step and 27 s of compilation; Triton's products untuned
take 108 ms, and tuning them compiles for minutes."""


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def run(
    setup: Setup, part: Part, weights: Weights, data: dict[str, Any], key: jax.Array, rate: jax.Array
) -> tuple[Weights, jax.Array]:
    """`part.steps` steps, and their mean loss."""
    loss = partial(setup.task.vae_loss if part.phase == "vae" else setup.task.flow_loss, setup, part)

    def step(weights: Weights, _: None) -> tuple[Weights, jax.Array]:
        value, grads = jax.value_and_grad(loss)(weights.params, data, jax.random.fold_in(key, weights.step))
        return update(weights, grads, rate, setup.warm_up), value

    if part.steps == 1:
        return step(weights, None)
    weights, losses = jax.lax.scan(step, weights, None, length=part.steps)
    return weights, losses.mean()


class Programs:
    """Compiled programs, made ahead in threads so that the device need not wait for the next stage's."""

    def __init__(self, setup: Setup, stages: tuple[Stage, ...], state: State, data: dict[str, Any]):
        self.pool = ThreadPoolExecutor(4)
        self.futures: dict[Part, Future] = {}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, data))
        self.setup, self.stages, (self.state, self.data) = setup, stages, shapes

    def prepare(self, stage: Stage) -> None:
        """Compile the stage's programs, and after those the next one's, where other work runs on an accelerator."""
        first, ahead = self.stages.index(stage), int(jax.default_backend() != "cpu")
        for needed in self.stages[first : first + 1 + ahead]:
            for part in needed.parts:
                if part not in self.futures:
                    self.futures[part] = self.pool.submit(self.compile, part)
            if not all(self.futures[part].done() for part in needed.parts):
                return

    def compile(self, part: Part) -> Any:
        scalar, key = jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
        options = dict(GPU_OPTIONS)
        if self.setup.task.autotuned:
            del options["xla_gpu_autotune_level"]
        lowered = run.lower(self.setup, part, getattr(self.state, part.phase), self.data, key, scalar)
        return lowered.compile(compiler_options=options if jax.default_backend() == "gpu" else None)

    def choose(self, stage: Stage, number: int, *, patient: bool) -> Part:
        """The part whose turn it is; unless `patient`, the next of the stage that is compiled."""
        turns = [stage.parts[(number + i) % len(stage.parts)] for i in range(len(stage.parts))]
        return next((part for part in turns if patient or self.futures[part].done()), turns[0])

    def __getitem__(self, part: Part) -> Any:
        return self.futures[part].result()

    def close(self) -> None:
        """Compilations that wait are dropped."""
        self.pool.shutdown(wait=False, cancel_futures=True)
