"""From prompts to a step plan: which steps run the network, and how x moves between them.

For a plan of half the steps, it costs three dense runs. The first gives the velocities and their Gram matrix
(`plan.steps`). The second starts a little off, a fifth of the way on, and shows how errors grow. Two plans run by the
Gram matrix alone, and show what PSNR a predicted error comes to. Then the plan runs on the same prompts. At each node,
least squares finds the coefficients with which x lands nearest to the dense run's x, from where the plan really is. All
are calls of the sampling program: it keeps the last velocity as its solver's state.

A plan may aim at the limit of many steps instead. Then a converged run is the target, for four dense runs more.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from dfa2_jax.calibration.journal import Journal
from dfa2_jax.parallel.processes import of_first
from dfa2_jax.pipeline.ahead import check_decoder, compile_decoder
from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.timing import told
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.setting import MARGIN, StepCalibration, UnfittedRun, decibels, predicted_psnr
from dfa2_jax.plan.steps import Nodes, StepSearch, adams_coefficients, count_for
from dfa2_jax.sampling.inputs import Inputs
from dfa2_jax.sampling.loop import State, denoise
from dfa2_jax.sampling.solvers.base import Multistep

PERTURBATION = 0.01
"""Root mean square of what the second run starts off by, where the noise's is 1."""

REFINED = 4
"""Steps of the converged run for each step of the dense one."""

UNFITTED = (0.35, 0.6)
"""Shares of the steps that unfitted plans run: they kept 32 to 47 and 56 to 70 dB, around what is asked for. By them,
predictions came within 3.7 dB of what 64 other prompts kept, where that was above 37 dB: no other pair came nearer."""

RIDGE = 1e-4
"""Towards Euler's coefficients, of the products' mean diagonal: a few prompts must not decide what they do not show."""

Latents = Float[np.ndarray, "B V C"]


def check_solver(call: Call, target: str) -> None:
    """Raises ValueError where steps of the call's solver cannot be planned, or not towards this target."""
    solver, scheduler = call.inputs.solver, call.setting.scheduler or type(call.inputs.solver).__name__
    if not isinstance(solver, Multistep):
        raise ValueError(f"{scheduler}: a plan of steps moves x as Euler's steps do. Pass delta=, for heads alone.")
    if target == "converged" and (solver.scales(call.schedule.sigmas) != 1).any():
        raise ValueError(f"{target=}: between the times of {scheduler}, noise is not linear in time. Leave it out.")


class StepRuns:
    """A call's dense steps, one at a time; those that a journal knows run no network.

    Latents are flow matching's: the call's own are `scales` times as large, by noise level.
    """

    def __init__(self, call: Call, journal: Journal, progress: bool, *compilers: Callable[[], None]):
        """Compiles first, so that the bar hides no compilation.

        Args:
            compilers: of programs that others run under the same bar.
        """
        self.call, self.journal = call, journal
        self.scales = call.inputs.solver.scales(call.schedule.sigmas)
        self.inputs = cache(self._inputs)
        if progress:
            with told("compiling"):
                self._run(np.asarray(call.start().latents), 0, 0)
                self.call = compile_decoder(call)
                for compiler in compilers:
                    compiler()
        else:
            self.call = check_decoder(call)
        self.bar = tqdm(desc="calibrate", unit="step", disable=not progress)

    def _inputs(self, part: int) -> Inputs:
        """Inputs of steps that begin later: `part` of `REFINED` of the way to the next. Times are linear in noise."""
        inputs, schedule = self.call.inputs, self.call.schedule
        if part:
            ahead = np.diff(schedule.times, append=np.float32(0)) * np.float32(part / REFINED)
            inputs = replace(inputs, timesteps=schedule.embedded(schedule.times + ahead))
        return self.call.put(inputs)

    def step(self, x: Latents, step: int, part: int = 0) -> tuple[Latents, Latents]:
        """The latents after a step of Euler's, and the guided velocity at `x`; float32.

        Args:
            part: as in `inputs`. The velocity is of there; the latents are of no use.
        """

        x = of_first(x)  # a key that one process lacks would let it run alone

        def both() -> np.ndarray:
            run = self._run(self.scales[step] * x, step, step + 1, part)
            return np.stack([np.asarray(run.latents) / self.scales[step + 1], run.solver])

        key = hashlib.sha256((REFINED * step + part).to_bytes(4, "little") + x.tobytes()).digest()
        after, velocity = self.journal.kept(key, (2, *x.shape), both)
        self.bar.update()
        return after, velocity

    @property
    def start(self) -> Latents:
        """Before the first step."""
        return np.asarray(self.call.start().latents) / self.scales[0]

    def pixels(self, x: Latents) -> Iterator[Float[np.ndarray, "F H W 3"]]:
        """Frames in [0, 1] of each image or video of latents after the last step: all at once may not fit."""
        for latents in self.call.latents(self.scales[-1] * x):
            (frames,) = self.call.pipeline.decode(latents[None], tiling=self.call.options.vae_tiling)
            yield frames

    def _run(self, x: Latents, start: int, stop: int, part: int = 0) -> State:
        pipeline, state = self.call.pipeline, State(*self.call.put_state((x, np.zeros_like(x))))
        graph, options = pipeline.transformer.graph, {"rounding": pipeline.rounding, "mesh": self.call.mesh}
        with jax.enable_x64(False):
            return denoise(graph, self.call.params, state, self.inputs(part), start, stop, **options)


@dataclass(frozen=True)
class Trajectory:
    """A run that plans imitate. latents: at every noise level; velocities: of every step."""

    latents: Float[np.ndarray, "levels B V C"]
    velocities: Float[np.ndarray, "steps B V C"]

    @classmethod
    def converged(cls, runs: StepRuns, sigmas: np.ndarray) -> "Trajectory":
        """At the dense run's noise levels, of `REFINED` times its steps: Adams and Bashforth's of second order."""
        x = runs.start
        last, latents, velocities = np.zeros_like(x), [x], []
        refined = np.interp(np.arange(REFINED * (len(sigmas) - 1) + 1) / REFINED, np.arange(len(sigmas)), sigmas)
        for number, (now, before) in enumerate(adams_coefficients(refined)):
            step, part = divmod(number, REFINED)
            _, velocity = runs.step(x, step, part)
            x, last = x + now * velocity + before * last, velocity
            if part == 0:
                velocities.append(velocity)
            if part == REFINED - 1:
                latents.append(x)
        return cls(np.stack(latents), np.stack(velocities))

    @classmethod
    def dense(cls, runs: StepRuns) -> "Trajectory":
        latents, velocities = [runs.start], []
        for step in range(runs.call.request.steps):
            after, velocity = runs.step(latents[-1], step)
            latents.append(after)
            velocities.append(velocity)
        return cls(np.stack(latents), np.stack(velocities))

    def gram(self, moved: bool) -> Float[np.ndarray, "vectors vectors"]:
        """Mean products of the velocities, float64; `moved`: and of the latents' moves, after them."""
        vectors = np.concatenate([self.velocities, np.diff(self.latents, axis=0)]) if moved else self.velocities
        flat = vectors.reshape(len(vectors), -1)
        parts = np.array_split(flat, -(-flat.shape[1] // 2**20), axis=1)  # 8 MB a step in float64
        return sum(part.astype(np.float64) @ part.T.astype(np.float64) for part in parts) / flat.shape[1]  # type: ignore

    def errors(self, latents: Latents, level: int) -> float:
        return mean_square(latents - self.latents[level])


def mean_square(x: np.ndarray) -> float:
    return float(np.mean(np.square(x, dtype=np.float64)))


def growth(runs: StepRuns, dense: Trajectory, sigmas: np.ndarray) -> tuple[Float[np.ndarray, " levels"], Latents]:
    """What a squared error at each noise level has grown by at the end, never rising; and where the run ended.

    It starts off along an error that a plan makes: of one velocity in place of all up to there. White noise would die
    out; only errors in the flow's own directions count.
    """
    steps = len(sigmas) - 1
    begin = min(max(2, steps // 5), steps)
    moves = np.diff(sigmas)[:begin]
    gap = np.tensordot(moves, dense.velocities[:begin] - dense.velocities[0], 1)
    scale = np.sqrt(mean_square(gap))
    x = (dense.latents[begin] + gap * (PERTURBATION / scale if scale else 0)).astype(np.float32)
    errors = [dense.errors(x, begin)]
    for step in range(begin, steps):
        x, _ = runs.step(x, step)
        errors.append(dense.errors(x, step + 1))
    grown = np.maximum(errors[-1], 1e-30) / np.maximum(errors, 1e-30)
    grown = np.maximum.accumulate(grown[::-1])[::-1]
    return np.concatenate([np.full(begin, grown[0]), grown]), x


class PlannedRun:
    """A plan's own run, whose heads reuse outputs: a node at a time, from latents that the caller has.

    A journal knows velocities, but no outputs of heads: before the first node that it does not know, earlier ones run.
    """

    def __init__(self, runs: StepRuns, plan: Plan):
        self.runs, self.digest, self.nodes, self.known = runs, plan.digest, plan.nodes, []
        self.run, self.state = runs.call.program(plan)

    def velocity(self, x: Latents, number: int) -> Latents:
        """The guided velocity at a node, of these latents."""
        self.known.append((x, number))
        key = hashlib.sha256(f"{self.digest} {number} ".encode() + x.tobytes()).digest()
        self.runs.bar.update()
        return self.runs.journal.kept(key, x.shape, self._last)

    def _last(self) -> np.ndarray:
        """The velocity at the last of the nodes that did not run yet."""
        for x, number in self.known:
            latents = self.runs.call.put_state(self.runs.scales[self.nodes[number]] * x)
            state = State(latents, self.state.solver, self.state.memory)
            self.state = self.run(state, number, number + 1)
        self.known = []
        return np.asarray(self.state.solver)


def fit(
    target: Trajectory, sigmas: np.ndarray, nodes: Nodes, velocity_at: Callable[[Latents, int], Latents]
) -> tuple[Nodes, Latents]:
    """Coefficients of the plan's own run, and the latents that it ends at.

    Args:
        velocity_at: of latents, at a node by its number; called once a node, in their order.
    """
    x, last, coefficients = target.latents[0], None, []
    for number, (node, following) in enumerate(zip(nodes.steps, (*nodes.steps[1:], len(sigmas) - 1), strict=True)):
        velocity = velocity_at(x, number)
        basis = [velocity] if last is None else [velocity, last]
        rows = np.stack([one.ravel() for one in basis]).astype(np.float64)
        euler = np.zeros(len(basis))
        euler[0] = sigmas[following] - sigmas[node]
        missed = (target.latents[following] - x).ravel() - euler @ rows
        products = rows @ rows.T
        ridge = RIDGE * np.trace(products) / len(basis) * np.eye(len(basis))
        weights = (euler + np.linalg.solve(products + ridge, rows @ missed)).astype(np.float32)
        x = x + sum(weight * one for weight, one in zip(weights, basis, strict=True))
        coefficients.append(np.pad(weights, (0, 2 - len(basis))))
        last = velocity
    return replace(nodes, coefficients=np.array(coefficients, np.float64)), x


@dataclass(frozen=True)
class StepPlans:
    """Plans of one call for any budget, each fitted in a run of its own.

    facts: of `StepCalibration`, how they are found.
    started: latents at the end of the run that started a little off (`growth`).
    """

    runs: StepRuns
    facts: dict[str, Any]
    target: Trajectory
    search: StepSearch
    started: Latents

    @classmethod
    def measured(cls, runs: StepRuns, facts: dict[str, Any]) -> "StepPlans":
        """The runs that every plan needs."""
        sigmas = np.asarray(runs.call.schedule.sigmas, np.float64)
        target = dense = Trajectory.dense(runs)
        grown, off = growth(runs, dense, sigmas)
        if facts["target"] == "converged":
            target = Trajectory.converged(runs, sigmas)
        return cls(runs, facts, target, StepSearch(sigmas, target.gram(moved=target is not dense), grown), off)

    @cached_property
    def images(self) -> list[Float[np.ndarray, "F H W 3"]]:
        """The target's."""
        return list(self.runs.pixels(self.target.latents[-1]))

    def psnr_of(self, x: Latents) -> float:
        """Mean over the images that these latents become, in dB against the target's."""
        pairs = zip(self.runs.pixels(x), self.images, strict=True)
        kept = np.mean([-decibels(mean_square(a - b)) for a, b in pairs])
        return float(of_first(np.asarray(kept, np.float64)))  # processes must all choose the same plan

    @cached_property
    def psnr_offset(self) -> float:
        """Between the PSNR of images and that of their latents, in the run that started off: it serves plans of heads.

        The model in the box has 15.6 dB there, at 48 dB. Plans of 31 to 54 dB have 12.5 to 15.7, one of 62 dB has 20.9.
        """
        return self.psnr_of(self.started) + decibels(mean_square(self.started - self.target.latents[-1]))

    @cached_property
    def unfitted(self) -> tuple[UnfittedRun, ...]:
        """What two plans kept; one, where both have as many nodes."""
        least, steps = min(self.search.paths), self.search.num_steps
        plans = map(self.search.nodes, sorted({max(least, round(share * steps)) for share in UNFITTED}))
        return tuple(
            UnfittedRun(predicted_error=nodes.predicted_error, measured_psnr=self.psnr_of(self.run(nodes)))
            for nodes in plans
        )

    def run(self, nodes: Nodes) -> Latents:
        """The latents that an unfitted plan ends at.

        As long as it runs every step, it is where the target is, and runs no network. Of a converged target, that is
        true of the first step alone.
        """
        x, last = self.target.latents[0], np.zeros_like(self.target.latents[0])
        known = 1 if self.search.is_moved else sum(step == number for number, step in enumerate(nodes.steps))
        for step, (now, before) in zip(nodes.steps, nodes.coefficients.astype(np.float32), strict=True):
            velocity = self.target.velocities[step] if step < known else self.runs.step(x, step)[1]
            x, last = x + now * velocity + before * last, velocity
        return x

    def fitted(self, nodes: Nodes, heads: Plan | None = None, **facts: Any) -> Plan:
        """With coefficients of its own run, and the error that it ends with.

        All steps towards the dense run, with full heads, are that run: they stay Euler's, and nothing runs.

        Args:
            heads: a plan of these nodes, whose heads are to stay; None: full.
            facts: of `StepCalibration`, beside those of all plans.
        """
        plan = Plan.full(self.runs.call.setting, nodes.steps) if heads is None else heads
        if heads is None and nodes.steps == tuple(range(self.search.num_steps)) and not self.search.is_moved:
            nodes, x = replace(nodes, coefficients=plan.coefficients), self.target.latents[-1]
        elif heads is None:
            nodes, x = fit(self.target, self.search.sigmas, nodes, lambda x, n: self.runs.step(x, nodes.steps[n])[1])
        else:
            nodes, x = fit(self.target, self.search.sigmas, nodes, PlannedRun(self.runs, heads).velocity)
        record = StepCalibration(
            **self.facts,
            **facts,
            gram=tuple(map(tuple, self.search.gram.tolist())),
            growth=tuple(self.search.growth.tolist()),
            unfitted=self.unfitted,
            predicted_error=nodes.predicted_error,
            measured_error=mean_square(x - self.target.latents[-1]),
            measured_psnr=self.psnr_of(x),
        )
        return replace(plan, coefficients=nodes.coefficients, step_calibration=record)

    def for_budget(self, *, speedup: float | None, psnr: float | None) -> Plan:
        """A plan for one budget: as fast as `speedup`, or as near to the target as `psnr` in dB."""
        if speedup is not None:
            return self.for_speedup(speedup)
        assert psnr is not None
        return self.for_psnr(psnr)

    def for_speedup(self, speedup: float) -> Plan:
        """The plan of as many nodes as leave it so fast."""
        return self.fitted(self.search.nodes(count_for(speedup, self.search.num_steps)))

    def for_psnr(self, psnr: float) -> Plan:
        """The plan of the fewest nodes whose measured PSNR is `MARGIN` above what is asked.

        Each plan's own run corrects the guess of the next one's number of nodes: being fitted, it is nearer by some dB.

        Raises:
            ValueError: the target is the limit, and not even every step comes so near to it.
        """
        best, few, many, gain = None, min(self.search.paths) - 1, self.search.num_steps + 1, 0.0
        predicted = partial(predicted_psnr, self.unfitted)
        while few + 1 < many:
            guess = len(self.search.for_psnr(psnr + MARGIN - gain, predicted).steps)
            plan = self.fitted(self.search.nodes(min(max(guess, few + 1), many - 1)))
            record = plan.step_calibration
            assert record is not None
            gain = record.psnr - predicted(record.predicted_error)
            if keeps(plan, psnr):
                best, many = plan, len(plan.nodes)
            else:
                few = len(plan.nodes)
        return best if best and len(best.nodes) < self.search.num_steps else self.of_every_step(psnr, best)

    def of_every_step(self, psnr: float, plan: Plan | None = None) -> Plan:
        """The plan where no other keeps what was asked; raises ValueError where it must, and does not either.

        Args:
            plan: of every step, where it ran.
        """
        plan = self.fitted(self.search.nodes(self.search.num_steps)) if plan is None else plan
        assert plan.step_calibration is not None
        path = self.runs.journal.path
        advice = "" if path is None else f" {path} keeps what ran, for another psnr; remove it to take more steps."
        promised = plan.step_calibration.psnr - MARGIN
        plan.step_calibration.check_of_every_step(psnr, promised, self.search.num_steps, advice)
        return plan


def keeps(plan: Plan, psnr: float) -> bool:
    """Whether a fitted plan's measured PSNR is `MARGIN` above this."""
    assert plan.step_calibration is not None
    return plan.step_calibration.psnr >= psnr + MARGIN
