"""One call of the pipeline: checked, encoded, run, decoded."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from dfa2_jax.families.base import Schedule, SeesReference
from dfa2_jax.nn.attention import Attend, AttentionCall, Planned, by_stack, gpu_kind
from dfa2_jax.options import Options
from dfa2_jax.parallel.dealing import deal_plan
from dfa2_jax.parallel.mesh import DeviceMesh
from dfa2_jax.pipeline.decoding import in_bytes
from dfa2_jax.pipeline.embedding import embed
from dfa2_jax.pipeline.loaded import Loaded
from dfa2_jax.pipeline.request import Request
from dfa2_jax.pipeline.start import noise_of, start_of
from dfa2_jax.plan.method import PlanError
from dfa2_jax.plan.orders import lies, orders
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.setting import AttentionLayer, Setting
from dfa2_jax.plan.suffix import from_step
from dfa2_jax.sampling.inputs import Inputs, pad_steps
from dfa2_jax.sampling.loop import HeadPlans, State, denoise, denoise_planned
from dfa2_jax.sampling.memory import empty_memory, stack_shapes
from dfa2_jax.sampling.noise import BatchNoise, StepNoise
from dfa2_jax.sampling.solvers.base import Multistep, NoisySolver
from dfa2_jax.sampling.tokens import Grid

logger = logging.getLogger("dfa2_jax")

Run = Callable[[State, int, int], State]
"""`run(state, start, stop)`: the state after these steps. The state that went in may be given away."""


@dataclass(frozen=True)
class Call:
    """A checked call with its prompts encoded.

    options: as the caller gave them; request: with every default filled in.
    tokens: patchified latents [B, V, P] to start from, of a `grid`.
    seeds: one per image, None where the latents were given.
    sigmas: noise levels of the whole schedule; `schedule` begins at the step that a picture starts at.
    num_text: tokens that attention sees as text; num_reference: those of a reference picture among them.
    inputs: all that a step needs beside the latents.
    devices: those that run it; none: the pipeline's.
    """

    pipeline: Loaded
    options: Options
    request: Request
    grid: Grid
    tokens: np.ndarray
    seeds: list[int | None]
    sigmas: Float[np.ndarray, " levels"]
    schedule: Schedule
    num_text: int
    inputs: Inputs = field(repr=False)
    num_reference: int = 0
    devices: tuple[Any, ...] = ()

    @cached_property
    def layers(self) -> tuple[AttentionCall, ...]:
        """Every attention layer, in order of execution."""
        return self.pipeline.config.calls(self.num_text, self.grid.num_visual)

    @property
    def batch(self) -> int:
        """The transformer's batch: twice the images under guidance."""
        return self.request.batch * self.inputs.guidance.sides

    @cached_property
    def mesh(self) -> DeviceMesh | None:
        """The pipeline's devices, as this batch uses them. None: the program is of one device anyway.

        A mesh of one tells kernels that no other GPU takes part.
        """
        devices, transformer = self.devices or self.pipeline.devices, self.pipeline.transformer
        if self.options.attend is not None or not (devices or (gpu_kind() is not None and jax.device_count() > 1)):
            return None
        devices = devices or [*jax.tree.leaves(transformer.params)[0].devices()]
        return DeviceMesh.of(devices, self.batch, self.pipeline.shard_weights)

    @property
    def shares_tokens(self) -> bool:
        """Whether devices share an image's tokens."""
        return self.mesh is not None and self.mesh.tokens > 1

    def over_batch(self) -> "Call":
        """This call on as many devices as share its batch alone, where every image is whole."""
        mesh = self.mesh
        return replace(self, devices=mesh.members[: mesh.rows]) if mesh is not None and self.shares_tokens else self

    @cached_property
    def params(self) -> Any:
        """The transformer's, as arrays of this call's mesh."""
        params = self.pipeline.transformer.params
        return params if self.mesh is None else jax.tree.map(self.mesh.adopted, params)

    @cached_property
    def setting(self) -> Setting:
        """What a plan is bound to."""
        pipeline, request = self.pipeline, self.request
        return Setting(
            pipeline_class=pipeline.pipeline_class,
            weights=pipeline.fingerprint,
            precision=pipeline.precision,
            scheduler=request.scheduler.get("_class_name", ""),
            sigmas=tuple(float(sigma) for sigma in self.sigmas),
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            token_frames=self.grid.frames,
            num_reference=self.num_reference,
            use_dynamic_cfg=self.options.use_dynamic_cfg,
            doubled_batch=self.inputs.guidance.sides == 2,
            num_heads=pipeline.config.num_attention_heads,
            layers=tuple(AttentionLayer.of(layer.name, layer.layout) for layer in self.layers),
        )

    def put(self, x: Any) -> Any:
        """A pytree on the device, or whole on each of the mesh's."""
        return jax.device_put(x) if self.mesh is None else self.mesh.put(x)

    def put_state(self, x: Any) -> Any:
        """What the loop carries, as it comes back from a step: another sharding would compile the loop anew."""
        return x if self.mesh is None else self.mesh.put(x)

    @jax.enable_x64(False)  # what attention remembers is of 32 bits, too
    def start(self, attend: Attend | None = None, mesh: DeviceMesh | None = None) -> State:
        """Before the first step.

        Args:
            mesh: of devices that share what is remembered.

        Raises:
            MemoryError: what `attend` remembers does not fit, without text encoders either.
        """
        rounding, latents = self.pipeline.rounding, self.tokens
        if rounding is not None and self.schedule.rounds_noise:
            latents = latents.astype(rounding).astype(np.float32)
        latents, solver = self.put_state((latents, self.inputs.solver.init(latents)))
        if attend is None:
            return State(latents, solver)
        shapes, images = self.memory_shapes(mesh), self.request.batch
        try:
            return State(latents, solver, empty_memory(attend, shapes, images=images))
        except MemoryError:
            if not self.pipeline.networks.release_text_encoders():
                raise
        return State(latents, solver, empty_memory(attend, shapes, images=images))

    def memory_shapes(self, mesh: DeviceMesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """By stack of layers, their outputs."""
        config = self.pipeline.config
        heads = config.num_attention_heads, config.attention_head_dim
        return stack_shapes(self.layers, self.batch, heads, self.pipeline.dtype, mesh)

    def num_steps(self, plan: Plan | None) -> int:
        """Steps of the loop: times that the network runs."""
        return len(self.schedule.timesteps) if plan is None else len(plan.nodes)

    @cached_property
    def plan(self) -> Plan | None:
        """The caller's, of the steps that run."""
        return None if self.options.plan is None else from_step(self.options.plan, self.request.first)

    def inputs_for(self, plan: Plan | None) -> Inputs:
        """What the steps of a plan need.

        Raises:
            PlanError: the plan leaves out steps, and the call's solver is another than the plan's coefficients are of.
        """
        if plan is None or plan.runs_every_step:
            return self.inputs
        solver, levels = self.inputs.solver, np.asarray(self.schedule.sigmas)[[*plan.nodes, -1]]
        if not isinstance(solver, Multistep):
            name = type(solver).__name__
            raise PlanError(f"the plan's coefficients are of velocities, and the call's solver is {name} without them.")
        return self.inputs.at(np.array(plan.nodes), solver.planned(levels, plan.coefficients))

    def step_plans(self, plan: Plan) -> HeadPlans:
        """A plan as the loop reads it: its heads in the order of their work, or dealt to devices."""
        windows, order = plan.half_windows(), plan.head_order()
        if self.mesh is not None and self.mesh.tokens > 1:
            windows, order = deal_plan(windows, [layer.layout for layer in self.layers], self.mesh.tokens)
        half_window, head_order = (by_stack(self.layers, pad_steps(x), axis=1) for x in (windows, order))
        plans, written = HeadPlans(half_window, head_order, first=np.zeros((), np.int32)), orders(plan)
        if not written.any():
            return plans
        if self.mesh is not None and self.mesh.tokens > 1:
            raise PlanError(
                f"the plan has arrows over time, which take whole sequences, and {self.mesh.tokens} devices share "
                "tokens. Take as many devices as the batch has rows, or calibrate with orders=('native',)."
            )
        order, written = (by_stack(self.layers, pad_steps(x), axis=1) for x in (written, lies(plan)))
        return replace(plans, order=order, lies=written)

    def loop(
        self, plan: Plan | None = None, *, implementation: str | None = None, skip_projections: bool = True
    ) -> Run:
        """The steps of this call, by a plan.

        It is a program of 32 bits, whatever `jax_enable_x64` says.

        Args:
            implementation: of attention, to measure what another order of the same sums changes; None: the best one.
            skip_projections: as in `denoise_planned`.
        """
        graph, put = self.pipeline.transformer.graph, self.put
        options = {"inputs": put(self.inputs_for(plan)), "rounding": self.pipeline.rounding, "mesh": self.mesh}
        options |= {"implementation": implementation}
        if self.remembers(plan):
            options |= {"plans": put(self.step_plans(plan)), "skip_projections": skip_projections}
            options |= {"frames": self.grid.frames}
            program = denoise_planned
        else:
            options |= {"attend": self.options.attend}
            program = denoise
        run = jax.enable_x64(False)(partial(program, graph, self.params, **options))

        def steps(state: State, start: int, stop: int) -> State:
            return run(state, start=start, stop=stop)

        def each(state: State, start: int, stop: int) -> State:
            for i in range(start, stop):
                state = steps(self.with_noise(state, i), i, i + 1)
            return state if start < stop else steps(state, start, stop)

        return each if isinstance(self.inputs.solver, NoisySolver) else steps

    @cached_property
    def step_noise(self) -> StepNoise:
        """What the solver adds. The seed's stream begins with the latents that sampling starts from, where it drew
        them."""

        def begin() -> BatchNoise:
            noise = noise_of(self.pipeline, self.options, self.request, self.grid)
            if self.options.latents is None:
                noise.draw()
            return noise

        return StepNoise(begin, self.inputs.solver.draws)

    def with_noise(self, state: State, i: int) -> State:
        """The state before step `i`, with what the solver adds there, if it adds any."""
        solver = self.inputs.solver
        if not isinstance(solver, NoisySolver):
            return state
        noise = self.pipeline.family.tokens.pack_noise(self.step_noise[i])
        return replace(state, solver=solver.with_noise(state.solver, self.put_state(noise)))

    @staticmethod
    def remembers(plan: Plan | None) -> TypeGuard[Plan]:
        """Whether heads' outputs are kept from step to step: not by a plan of steps alone.

        One of full heads whose steps were never planned keeps them: others are measured from there.
        """
        return plan is not None and (not plan.heads_are_full or plan.runs_every_step and plan.step_calibration is None)

    def program(self, plan: Plan | None = None, **options: Any) -> tuple[Run, State]:
        """`loop`, and the state that it starts from.

        Raises:
            MemoryError: the outputs that the plan keeps from step to step do not fit.
        """
        attend = Planned() if self.remembers(plan) else self.options.attend
        return self.loop(plan, **options), self.start(attend, self.mesh)

    def run(self) -> np.ndarray:
        """Patchified latents after all steps.

        All steps are one program call, or one call a step when someone watches: the same program and the same numbers.
        """
        plan, watcher = self.plan, self.options.callback_on_step_end
        (run, state), steps = self.program(plan), self.num_steps(plan)
        if watcher is None and not self.options.progress:
            return np.asarray(run(state, 0, steps).latents)
        for i in tqdm(range(steps), desc="denoise", disable=not self.options.progress):
            state = jax.block_until_ready(run(state, i, i + 1))
            if watcher is not None:
                latents = self.put_state(self._watched(watcher, i, np.asarray(state.latents)))
                state = State(latents, state.solver, state.memory)
        return np.asarray(state.latents)

    def _watched(self, watcher: Callable[..., Any], i: int, tokens: np.ndarray) -> np.ndarray:
        """The latents after a callback, which may return others or change them in place."""
        step = i if self.plan is None else self.plan.nodes[i]
        family, timestep = self.pipeline.family, self.schedule.timesteps[step].item()
        shown = {"latents": np.array(family.output_latents(tokens, self.grid))}
        returned = watcher(self.pipeline, i, timestep, shown)
        returned = shown if returned is None else returned
        if not isinstance(returned, dict) or set(returned) - {"latents"}:
            raise ValueError(f"callback_on_step_end must return a dict of 'latents' alone, got {returned!r:.200}")
        return self.pipeline.given_tokens(returned.get("latents", shown["latents"]), self.request, self.grid)

    def latents(self, tokens: np.ndarray) -> Float[np.ndarray, "B C F h w"]:
        """Latents of patchified ones [B, V, P], without the first frames, which only fill up a token."""
        latents = self.pipeline.family.tokens.unpack(tokens, self.grid)
        return latents[:, :, latents.shape[2] - self.request.latent_frames :]

    def images(self, tokens: np.ndarray) -> Any:
        """Images or videos of patchified latents [B, V, P], in the form that the call asks for."""
        pipeline, output_type, is_video = self.pipeline, self.request.output_type, self.request.num_frames is not None
        if output_type == "latent":
            return pipeline.family.output_latents(tokens, self.grid)
        progress, tiling = is_video and self.options.progress, self.options.vae_tiling
        videos = pipeline.decode(self.latents(tokens), tiling=tiling, progress=progress, on_frames=self._hand_out)
        if output_type == "np":
            return videos if is_video else videos[:, 0]
        shown = [[Image.fromarray(in_bytes(frame)) for frame in video] for video in videos]
        return shown if is_video else [image for (image,) in shown]

    def _hand_out(self, number: int, first: int, frames: Float[np.ndarray, "f H W 3"]) -> None:
        """Shows new frames of a video to the callback."""
        if (watcher := self.options.callback_on_frames) is not None:
            watcher(self.pipeline, number, first, in_bytes(frames))


def prepare(pipeline: Loaded, options: Options, request: Request) -> Call:
    """Encodes prompts, draws noise and makes the schedule of a checked call."""
    _check_attend(options.attend, len(pipeline.devices))
    family, vae_scale = pipeline.family, pipeline.sizes.vae_scale
    _warn_of_frames(pipeline, request)
    grid = family.tokens.grid(request.latent_frames, request.height // vae_scale, request.width // vae_scale)
    scalars = pipeline.dtype if pipeline.torch_rounding else jnp.dtype(np.float32)
    schedule = family.schedule(request.scheduler, request.sigmas, request.steps, grid.num_visual, scalars)
    guidance = family.guidance(options, request.cfg_scale, schedule)
    sigmas = schedule.sigmas
    if request.first:
        guidance = guidance.at(np.arange(request.first, request.steps))
        schedule = schedule.from_step(request.first)
    text = embed(pipeline, request)
    start = start_of(pipeline, options, request, grid, schedule.sigmas)
    conditions, num_reference = family.conditions(text, grid, request.guidance_scale, scalars), 0
    if start.reference is not None:
        assert isinstance(family, SeesReference)
        conditions = family.with_reference(conditions, *start.reference, grid)
        num_reference = start.reference[0].shape[1]
    inputs = Inputs(
        conditions=conditions,
        timesteps=schedule.embedded(schedule.times),
        guidance=guidance,
        solver=schedule.solver,
        known=start.known,
        beside=start.beside,
    )
    num_text, tokens = text.text.shape[1] + num_reference, (start.tokens, start.seeds)
    call = Call(pipeline, options, request, grid, *tokens, sigmas, schedule, num_text, inputs, num_reference)
    if call.mesh is not None and call.mesh.tokens > (heads := pipeline.config.num_attention_heads):
        raise ValueError(
            f"{len(pipeline.devices)} devices, a batch of {call.batch}: {call.mesh.tokens} would share {heads} heads "
            "and some have none. Take fewer devices, or a batch that more of them divide."
        )
    if call.num_reference and call.shares_tokens:
        raise ValueError(
            f"devices do not share the tokens of image=, but {len(pipeline.devices)} of them would, of a batch of "
            f"{call.batch}: take as many devices as divide it."
        )
    return call


def _warn_of_frames(pipeline: Loaded, request: Request) -> None:
    """An even number of latent frames decodes to more frames than asked for, as in diffusers."""
    asked, latent = request.num_frames, request.latent_frames
    if asked is None or "vae" not in pipeline.networks:
        return
    config = pipeline.networks.config("vae")
    if (made := config.num_frames(latent)) != asked:
        ratio = config.temporal_compression_ratio
        logger.warning(
            "num_frames=%d are %d latent frames, an even number, which the autoencoder makes %d frames of; "
            "%d or %d stay as many", asked, latent, made, asked - ratio, asked + ratio,
        )  # fmt: skip


def _check_attend(attend: Any, devices: int) -> None:
    """Raises ValueError where the loop could not use it."""
    if attend is not None and devices > 1:
        raise ValueError(f"attend={attend!r:.100} runs on one device, not on {devices}: leave devices= out.")
    if attend is not None and not (isinstance(attend, Attend) and isinstance(attend, Hashable)):
        raise ValueError(
            f"attend={attend!r:.100} must be a hashable object with `memory` and `__call__`, such as a frozen "
            "dataclass (`dfa2_jax.nn.attention.Attend`)."
        )
