"""What heads could do without, measured along a dense run: for plans that weigh every head's errors by their effect.

The run goes by the program that tries every method at every step and takes none, so it gives the errors of arrows.
Every step's outputs, of some tokens, give the error of reusing any step at any other. At a few steps each layer in turn
reuses its last output, by the sampling program. The change of the velocity is the layer's sensitivity.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dfa2_jax.calibration.attends import Budget
from dfa2_jax.calibration.attention_share import StepShares
from dfa2_jax.calibration.steps import StepRuns, mean_square
from dfa2_jax.calibration.trial_step import calibrate_step
from dfa2_jax.nn.attention import in_order
from dfa2_jax.pipeline.call import Call
from dfa2_jax.plan.heads import HeadTables
from dfa2_jax.plan.method import CACHED_METHOD, FULL_METHOD, Method
from dfa2_jax.plan.plan import Plan
from dfa2_jax.sampling.loop import State
from dfa2_jax.sampling.memory import check_fits
from pallas_kernels.layout import CACHED
from pallas_kernels.mask import count_tiles

SAMPLED = 2**26
"""Values of outputs that the host keeps, of all steps: every so many tokens are left out."""

PROBED = (0.05, 0.2, 0.5, 0.9)
"""Shares of the way through the steps where sensitivity is measured. Between them its logarithm is interpolated."""


@dataclass(frozen=True)
class HeadRuns:
    """The runs of one call that measure its heads.

    shares: of a dense step's time.
    tiles: queries and keys of the tiles whose number is a method's cost.
    chunk: samples of the batch whose candidates a layer holds at once.
    """

    call: Call
    arrows: tuple[Method, ...]
    shares: StepShares
    tiles: tuple[int, int]
    chunk: int | None = None

    @property
    def methods(self) -> tuple[Method, ...]:
        """In the order of `HeadTables.costs`."""
        return (FULL_METHOD, CACHED_METHOD, *self.arrows)

    def costs(self) -> Float[np.ndarray, "layers methods"]:
        """Share of a dense step's time that a head takes by each method: in tiles, and in projections but for reuse."""
        layouts = [layer.layout for layer in self.call.layers]
        windows = [np.array([method.half_window(layout.num_visual) for method in self.methods]) for layout in layouts]
        tiles = [count_tiles(window, layout, *self.tiles) for window, layout in zip(windows, layouts, strict=True)]
        visited = np.array([count.visited for count in tiles], np.float64)
        projected = np.array([layout.length for layout in layouts])[:, None] * (np.array(windows) != CACHED)
        costs = self.shares.attention * visited / visited[:, 0].sum()
        return (costs + self.shares.projections * projected / projected[:, 0].sum()) / self.call.setting.num_heads

    @cached_property
    def _full(self) -> Plan:
        return Plan.full(self.call.setting)

    @cached_property
    def _step(self) -> Callable[..., Any]:
        """A step that tries every method and takes none."""
        transformer = self.call.pipeline.transformer
        return partial(
            calibrate_step,
            transformer.graph,
            self.call.params,
            inputs=self.call.put(self.call.inputs),
            budget=Budget.of(0.0, None, self.call.setting.num_heads),
            candidates=(CACHED_METHOD, *self.arrows),
            tiles=self.tiles,
            chunk=self.chunk,
            rounding=self.call.pipeline.rounding,
            mesh=self.call.mesh,
            frames=self.call.grid.frames,
        )

    def check_speedup(self, speedup: float | None) -> None:
        """Raises ValueError where heads alone cannot make all steps so much faster. The first step runs them all."""
        steps, saving = self.call.request.steps, float(self.costs()[:, 0].sum() * self.call.setting.num_heads)
        most = steps / (steps - (steps - 1) * saving)
        if speedup is not None and not 1 <= speedup < most:
            raise ValueError(
                f"{speedup=} must be from 1 to {most:.2f}: heads alone take {saving:.2f} of a step's time. Ask for "
                "less, or leave out heads='only'."
            )

    def check_memory(self) -> None:
        """Raises MemoryError where the outputs kept from step to step do not fit twice: probes start from a copy."""
        mesh = self.call.mesh
        twice = [self.call.memory_shapes(mesh)] * 2
        check_fits(twice, images=self.call.request.batch, devices=() if mesh is None else mesh.members)

    @jax.enable_x64(False)
    def compile(self) -> None:
        """Every program that measuring takes."""
        run, state = self.call.program(self._full)
        state = jax.tree.map(jnp.copy, run(state, 0, 0))
        self._step.func.lower(*self._step.args, **self._step.keywords, state=state, i=1).compile()
        self._sampled(state)

    def tables(self, runs: StepRuns) -> HeadTables:
        """One dense run, and at each of the steps that are probed a forward for each layer, and one more.

        An interruption repeats the dense run at most.
        """
        steps, layers, heads = self.call.request.steps, len(self.call.layers), self.call.setting.num_heads
        sizes = (layers, heads, steps, steps), (steps, layers, heads, len(self.arrows)), (steps, layers)
        counts = [prod(size) for size in sizes]
        key = hashlib.sha256(repr(("heads", self.methods, self.tiles)).encode()).digest()
        flat = runs.journal.kept(
            key, (sum(counts),), lambda: np.concatenate([table.ravel() for table in self._measured(runs)])
        )
        parts = np.split(flat.astype(np.float64), np.cumsum(counts)[:-1])
        reuse, arrows, sensitivity = (part.reshape(size) for part, size in zip(parts, sizes, strict=True))
        return HeadTables(reuse, arrows, sensitivity, self.costs())

    @jax.enable_x64(False)
    def _measured(self, runs: StepRuns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reuse, arrows and sensitivity, as in `HeadTables`."""
        layers, steps = self.call.layers, self.call.request.steps
        probed = sorted({min(max(1, round(share * steps)), steps - 1) for share in PROBED})
        run, state = self.call.program(self._full)
        state = run(state, 0, 1)
        outputs, errors, changes = [self._sampled(state)], [], []
        for i in range(1, steps):
            if i in probed:
                changes.append(self._changes(runs, state, i))
            state, chosen = self._step(state=state, i=i)
            outputs.append(self._sampled(state))
            errors.append(in_order(layers, {stack: pair[1] for stack, pair in chosen.items()}))
            runs.bar.update()
        errors = np.array([np.zeros_like(errors[0]), *errors], np.float64)  # [steps, layers, heads, candidates]
        sensitivity = np.array(changes) / np.maximum(errors[probed, :, :, 0].sum(-1), 1e-12)
        between = [np.interp(np.arange(steps), probed, np.log(np.maximum(x, 1e-20))) for x in sensitivity.T]
        return reuse_errors(layers, outputs), errors[..., 1:], np.exp(np.stack(between, axis=1))

    def _changes(self, runs: StepRuns, state: State, i: int) -> Float[np.ndarray, " layers"]:
        """Mean squared change of the velocity of step `i` where each layer in turn reuses its last output.

        Each layer's is kept as soon as it is known: together they are most of what a calibration of heads costs.
        """

        def velocity(plan: Plan) -> np.ndarray:
            return np.asarray(self.call.loop(plan)(jax.tree.map(jnp.copy, state), i, i + 1).solver)

        def change(layer: int) -> np.ndarray:
            alone = self._full.with_method(i, layer, None, CACHED_METHOD)
            return np.array(mean_square(velocity(alone) - exact()))

        exact, changes = cache(lambda: velocity(self._full)), []
        for layer in range(len(self.call.layers)):
            key = hashlib.sha256(repr(("change", i, layer)).encode()).digest()
            changes.append(runs.journal.kept(key, (), partial(change, layer)))
            runs.bar.update()
        return np.array(changes, np.float64)

    def _sampled(self, state: State) -> dict[str, np.ndarray]:
        """Every so many tokens of all outputs, by stack: [L, B, T, N, H]."""
        stride = -(-self.call.request.steps * sum(x.size for x in jax.tree.leaves(state.memory)) // SAMPLED)
        return {stack: np.asarray(x[:, :, ::stride]) for stack, x in state.memory.items()}


def reuse_errors(layers: Any, outputs: list[dict[str, np.ndarray]]) -> Float[np.ndarray, "layers heads steps steps"]:
    """Relative squared error of a head's output at a step, in place of another step's."""
    errors = {}
    for stack in outputs[0]:
        by_layer = []
        for layer in range(len(outputs[0][stack])):
            x = np.stack([step[stack][layer] for step in outputs]).astype(np.float32)  # [S, B, T, N, H]
            x = x.transpose(3, 0, 1, 2, 4).reshape(x.shape[3], len(outputs), -1)
            spread = x.var(axis=-1, dtype=np.float64)
            x = x - x.mean(axis=1, keepdims=True)  # differences keep their digits
            products = (x @ x.transpose(0, 2, 1)).astype(np.float64) / x.shape[-1]
            squares = np.einsum("nss->ns", products)
            apart = squares[:, :, None] + squares[:, None, :] - 2 * products
            by_layer.append(np.maximum(apart, 0) / np.maximum(spread, 1e-30)[:, :, None])
        errors[stack] = np.stack(by_layer)
    return in_order(layers, errors)
