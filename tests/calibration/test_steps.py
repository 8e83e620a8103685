"""Step plans, from prompts to images: against themselves, against diffusers, and after an interruption."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline_cases import PROMPTS, error, load_theirs, run_theirs

from dfa2_jax import Plan, PlanError, calibrate
from dfa2_jax.calibration import steps as of_steps
from dfa2_jax.calibration.journal import Journal
from dfa2_jax.options import Options
from dfa2_jax.plan.setting import StepCalibration, UnfittedRun
from dfa2_jax.plan.steps import Nodes, StepSearch, euler_coefficients
from dfa2_jax.sampling.guidance import ClassifierFree, SkipLayer
from dfa2_jax.sampling.solvers.flow_euler import FlowMultistep

CALL = {"height": 64, "width": 64, "num_inference_steps": 8, "max_sequence_length": 16, "progress": False}
CASES = {"tiny_sd35": {"guidance_scale": 3.0}, "tiny_flux_dev": {}}


@pytest.fixture(scope="module")
def planned(pipelines):
    """A pipeline, and its plan of half the steps."""
    made = {name: calibrate(pipelines(name), PROMPTS, **CALL, **CASES[name], speedup=2.0) for name in CASES}
    return lambda name: (pipelines(name), made[name])


def latents(pipeline, **options):
    return pipeline(**{"prompt": PROMPTS, "progress": False, "output_type": "latent"} | options).images


@pytest.mark.parametrize("name", CASES)
def test_the_plan_s_own_run_is_as_near_as_it_says(name, planned):
    pipeline, plan = planned(name)
    record = plan.step_calibration
    assert len(plan.nodes) == 4 and plan.heads_are_full and record.num_prompts == 2
    dense = latents(pipeline, **CALL, **CASES[name])
    by_plan = latents(pipeline, plan=plan)
    assert np.mean((by_plan - dense) ** 2) == pytest.approx(record.measured_error, rel=0.02)
    euler = latents(pipeline, plan=Plan.full(plan.setting, plan.nodes), guidance_scale=record.guidance_scale)
    fewer = latents(pipeline, **CALL | {"num_inference_steps": 4}, **CASES[name])
    resolved = latents(pipeline, plan=plan.resolve(speedup=2.0))
    errors = [np.mean((x - dense) ** 2) for x in (by_plan, resolved, euler, fewer)]
    assert errors[0] < min(errors[1:])
    images = [
        pipeline(PROMPTS, output_type="np", **options).images
        for options in ({"plan": plan, "progress": False}, CALL | CASES[name])
    ]
    psnr = np.mean(-10 * np.log10(np.mean(np.square(images[0] - images[1]), axis=(1, 2, 3))))
    assert psnr == pytest.approx(record.psnr, abs=0.1)


@pytest.mark.parametrize("name", CASES)
def test_plans_that_never_ran_keep_what_two_of_them_kept(name, planned):
    """`resolve` promises of these numbers of nodes what their own runs had."""
    pipeline, plan = planned(name)
    dense = pipeline(PROMPTS, output_type="np", **CALL, **CASES[name]).images
    runs = plan.step_calibration.unfitted
    for count, run in zip((3, 5), runs, strict=True):  # 0.35 and 0.6 of 8 steps
        resolved = plan.resolve(speedup=8 / count)
        assert len(resolved.nodes) == count
        assert resolved.step_calibration.predicted_error == run.predicted_error
        assert resolved.step_calibration.psnr == pytest.approx(run.measured_psnr)
        images = pipeline(PROMPTS, output_type="np", plan=resolved, progress=False).images
        kept = np.mean(-10 * np.log10(np.mean(np.square(images - dense), axis=(1, 2, 3))))
        assert kept == pytest.approx(run.measured_psnr, abs=0.1)


@pytest.mark.parametrize("target", ["dense", "converged"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_calibrated_too(steps, target, pipelines):
    """Where both plans that show what others keep have one node, one of them runs."""
    call = CALL | {"num_inference_steps": steps}
    plan = calibrate(pipelines("tiny_flux_dev"), PROMPTS[:1], **call, speedup=1.0, target=target)
    assert len(plan.nodes) == steps and len(plan.step_calibration.unfitted) == max(steps - 1, 1)
    promised = [plan.resolve(speedup=steps / count).step_calibration.psnr for count in range(1, steps + 1)]
    assert promised == sorted(promised) and np.isfinite(promised).all()


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("heads", ["full", "mixed"])
def test_latents_equal_diffusers_with_the_plan_as_its_scheduler(name, heads, planned, request):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from torch_reference import follow_plan

    pipeline, plan = planned(name)
    if heads == "mixed":
        plan = plan.with_method([1, 3], None, [0, 2], "cached").with_method(slice(1, None), None, 1, "arrow(1/4)")

    class Scheduler(FlowMatchEulerDiscreteScheduler):
        """Steps from node to node."""

        def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
            super().set_timesteps(num_inference_steps, device, sigmas, mu)
            self.timesteps, self.last, self.count = self.timesteps[list(plan.nodes)], 0.0, 0

        def step(self, velocity, timestep, sample, **_):
            now, before = plan.coefficients[self.count].astype(np.float32).tolist()
            sample = sample + now * velocity + before * self.last
            self.last, self.count = velocity, self.count + 1
            return (sample,)

    theirs = load_theirs(request.getfixturevalue(name))
    theirs.scheduler = Scheduler.from_config(theirs.scheduler.config)
    run = follow_plan(theirs, plan.half_windows(), [layer.layout for layer in plan.setting.layers])
    arguments = {key: value for key, value in (CALL | CASES[name]).items() if key != "progress"}
    want = run_theirs(
        theirs, 5, prompt=PROMPTS[0], **arguments, output_type="latent", callback_on_step_end=run.next_step
    )
    assert error(latents(pipeline, prompt=PROMPTS[0], plan=plan, seed=5), want) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_a_plan_to_the_limit_is_nearer_to_it_than_the_dense_run(name, pipelines, compilations):
    """The plan has all steps: a random network turns too much for fewer. The limit is of Euler's steps, 16 for one."""
    pipeline = pipelines(name)
    dense = latents(pipeline, **CALL, **CASES[name])
    compilations.clear()
    plan = calibrate(pipeline, PROMPTS, **CALL, **CASES[name], speedup=1.0, target="converged")
    by_plan = latents(pipeline, plan=plan)
    assert compilations == [], "the refined run is of the sampling program"
    limit = latents(pipeline, **CALL | {"num_inference_steps": 128}, **CASES[name])
    errors = [np.mean(np.square(x - limit)) for x in (by_plan, dense)]
    assert errors[0] < 0.95 * errors[1]
    record = plan.step_calibration
    assert record.target == "converged" and len(record.gram) == 16
    assert len(plan.nodes) == 8 and not plan.runs_every_step
    assert record.measured_error == pytest.approx(errors[0], rel=0.25)  # both limits have an error
    again = plan.resolve(speedup=2.0)
    assert len(again.nodes) == 4 and again.step_calibration.target == "converged"


RATES, TENTHS = np.linspace(-2, 2, 30).reshape(1, 6, 5).astype(np.float32), np.linspace(1, 0, 11)


class Flow(of_steps.StepRuns):
    """Ten steps of a linear flow, whose solution is known."""

    def __init__(self):
        start = SimpleNamespace(latents=np.ones_like(RATES))
        self.call = SimpleNamespace(start=lambda: start, request=SimpleNamespace(steps=10))
        self.ran, self.scales = [], np.ones(11, np.float32)

    def step(self, x, step, part=0):
        self.ran.append(step)
        velocity = RATES * x
        return x + np.float32(TENTHS[step + 1] - TENTHS[step]) * velocity, velocity


@pytest.mark.parametrize(("target", "ran"), [("dense", [5, 7]), ("converged", [1, 2, 5, 7])])
def test_an_unfitted_run_takes_from_the_target_where_it_starts_alike(target, ran):
    runs = Flow()
    target = getattr(of_steps.Trajectory, target)(*([runs] if target == "dense" else [runs, TENTHS]))
    search = StepSearch(TENTHS, target.gram(moved=len(ran) > 2), np.ones(11))
    steps = (0, 1, 2, 5, 7)
    bounds = zip((None, *steps), steps, (*steps[1:], 10), strict=False)
    nodes = Nodes(steps, np.array([search.move(*bound)[0] for bound in bounds]), 0.0)
    runs.ran.clear()
    end = of_steps.StepPlans(runs, {}, target, search, target.latents[-1]).run(nodes)
    assert runs.ran == ran
    x, last = np.ones_like(RATES), 0
    for now, before in nodes.coefficients:
        x, last = x + now * RATES * x + before * last, RATES * x
    np.testing.assert_allclose(end, x, rtol=1e-5)


def test_a_plan_of_half_the_steps_follows_a_smooth_flow_to_its_end():
    sigmas, end, runs = TENTHS, np.exp(-RATES), Flow()
    dense, limit = of_steps.Trajectory.dense(runs), of_steps.Trajectory.converged(runs, sigmas)
    errors = [np.mean(np.square(run.latents[-1] - end)) for run in (dense, limit)]
    assert errors[1] < errors[0] / 100
    search = StepSearch(sigmas, limit.gram(moved=True), np.ones(11))
    steps = search.nodes(5).steps
    nodes, x = of_steps.fit(limit, sigmas, search.nodes(5), lambda x, number: runs.step(x, steps[number])[1])
    assert len(nodes.steps) == 5 and np.mean(np.square(x - end)) < errors[0] / 10


def test_a_target_is_one_of_two(pipelines):
    with pytest.raises(ValueError, match="target='limit' is neither 'dense' nor 'converged'"):
        calibrate(pipelines("tiny_flux_dev"), PROMPTS, **CALL, target="limit")
    with pytest.raises(ValueError, match="target='converged' is beside speedup= or psnr="):
        calibrate(pipelines("tiny_flux_dev"), PROMPTS, **CALL, target="converged", delta=0.1)


def test_plans_of_steps_are_data(planned, compilations):
    """Other nodes, other counts of them, other heads: of one program without memory, and one with."""
    pipeline, plan = planned("tiny_flux_dev")

    def run(number):
        nodes = tuple(sorted({0, *np.random.default_rng(number).choice(range(1, 8), number, replace=False).tolist()}))
        steps = Plan.full(plan.setting, nodes)
        latents(pipeline, plan=steps, progress=bool(number % 2))
        latents(pipeline, plan=steps.with_method(1, 0, 0, "cached"), progress=bool(number % 2))

    run(1)
    compilations.clear()
    for number in range(1, 8):
        run(number)
    latents(pipeline, **CALL)
    assert compilations == []


def test_watchers_see_the_steps_that_run(planned, capsys):
    pipeline, plan = planned("tiny_flux_dev")
    seen = []
    watched = latents(pipeline, plan=plan, callback_on_step_end=lambda *call: seen.append(call[1:3]), progress=True)
    np.testing.assert_array_equal(watched, latents(pipeline, plan=plan))
    levels = [1000 * plan.setting.sigmas[node] for node in plan.nodes]
    assert [step for step, _ in seen] == [0, 1, 2, 3] and [time for _, time in seen] == pytest.approx(levels)
    assert "4/4" in capsys.readouterr().err


def test_a_dense_step_is_euler_s():
    generator = np.random.default_rng(0)
    x, velocity, last = (jnp.asarray(generator.normal(size=(2, 5, 3)), jnp.float32) for _ in range(3))
    sigmas = np.linspace(1, 0, 9, dtype=np.float32) ** 2
    solver = FlowMultistep.of(sigmas)
    after, kept = jax.jit(lambda x, v, i, last: solver.step(x, v, i, last))(x, velocity, 3, last)
    np.testing.assert_allclose(after, x + (sigmas[4] - sigmas[3]) * velocity, rtol=1e-6)  # the last one is not seen
    np.testing.assert_array_equal(kept, velocity)
    assert euler_coefficients(sigmas).dtype == np.float32


def test_an_interrupted_calibration_goes_on(pipelines, planned, tmp_path, monkeypatch):
    (pipeline, whole), path = planned("tiny_flux_dev"), tmp_path / "progress"
    add, made = Journal.add, []

    def stop(self, *record):
        add(self, *record)
        if len(self.places) == 16:  # of 8 dense steps, 6 perturbed, 2 + 4 of unfitted plans and 3 of the plan
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipeline, PROMPTS, **CALL, speedup=2.0, resume=path)
    path.write_bytes(path.read_bytes() + b"a torn record")
    monkeypatch.setattr(Journal, "add", lambda self, *record: (made.append(1), add(self, *record)))
    assert calibrate(pipeline, PROMPTS, **CALL, speedup=2.0, resume=path) == whole
    assert len(made) == 7  # the plans' first step is the dense run's
    faster = calibrate(pipeline, PROMPTS, **CALL, speedup=4.0, resume=path)
    assert len(made) <= 8, "the dense run and unfitted ones serve another budget"
    assert faster == calibrate(pipeline, PROMPTS, **CALL, speedup=4.0)
    with pytest.raises(ValueError, match="remove it to start anew"):
        calibrate(pipeline, PROMPTS[:1], **CALL, speedup=2.0, resume=path)


def test_steps_are_carried_to_another_size_where_noise_levels_are_the_same(planned):
    """SD3.5 has them. FLUX.1-dev's levels depend on the size; and heads are of one size."""
    pipeline, plan = planned("tiny_sd35")
    size = {"height": 96, "width": 64, "max_sequence_length": 24}
    there = Plan.full(pipeline.setting(**CALL | CASES["tiny_sd35"] | size, prompt=""), plan.nodes)
    own = replace(there, coefficients=plan.coefficients)
    options = {"guidance_scale": 5.0}
    np.testing.assert_array_equal(
        latents(pipeline, plan=plan, **size, **options), latents(pipeline, plan=own, **options)
    )
    with pytest.raises(PlanError, match=r"height is 64 in the plan and 96 in the call: .*\n.*layers is"):
        latents(pipeline, plan=plan.with_method(1, 0, 0, "cached"), **size)
    flux, other = planned("tiny_flux_dev")
    with pytest.raises(PlanError, match="sigmas is "):
        latents(flux, plan=other, height=128)


def test_a_journal_gives_back_whole_records_alone(tmp_path):
    path, keys = tmp_path / "journal", [bytes([number]) * 32 for number in range(3)]
    records = [np.full((2, 3), number, np.float32) for number in range(3)]
    journal = Journal(path, "digest")
    for key, record in zip(keys, records, strict=True):
        journal.add(key, record)
        np.testing.assert_array_equal(journal.get(key, (2, 3)), record)
    with pytest.raises(ValueError, match="another calibration writes it"):
        Journal(path, "digest")
    journal.close()
    content = bytearray(path.read_bytes())
    content[-(72 + 24) * 2 + 80] ^= 1  # a bit of the second record
    path.write_bytes(content)
    again = Journal(path, "digest")
    assert [*again.places] == keys[:1] and again.get(keys[1], (2, 3)) is None
    again.add(keys[2], records[2])
    again.close()
    last = Journal(path, "digest")
    assert [*last.places] == [keys[0], keys[2]]
    np.testing.assert_array_equal(last.get(keys[2], (2, 3)), records[2])
    last.close()
    with pytest.raises(ValueError, match="progress of this calibration starts with"):
        Journal(path, "other")


def test_a_promise_is_kept_by_as_few_nodes_as_can_be(pipelines, caplog):
    pipeline = pipelines("tiny_flux_dev")
    plan = calibrate(pipeline, PROMPTS, **CALL, psnr=30.0)
    assert plan.step_calibration.psnr >= 33.0 and 1 < len(plan.nodes) < 8
    faster = calibrate(pipeline, PROMPTS, **CALL, speedup=8 / (len(plan.nodes) - 1))
    assert faster.step_calibration.psnr < 33.0
    assert "below 37 dB other prompts can be worse" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 2.0, "psnr": 40.0}, "one of speedup, psnr must be given, not speedup=2.0 and psnr=40.0"),
        ({"speedup": 2.0, "delta": 0.4}, "speedup=2.0, psnr=None and delta=0.4: pass one of them"),
        ({"speedup": 0.5}, "speedup=0.5 must be from 1 to 8 for 8 steps"),
        ({"psnr": float("inf")}, "psnr=inf must be a finite number"),
        ({"c": None}, "c=None is of delta="),
    ],
)
def test_bad_budgets_are_named(options, message, pipelines, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        calibrate(pipelines("tiny_flux_dev"), PROMPTS, **CALL, **options)


def test_another_solver_takes_no_part(planned):
    from dataclasses import replace

    pipeline, plan = planned("tiny_flux_dev")
    call = pipeline.prepare(Options(prompt=PROMPTS[0], plan=plan))
    other = replace(call, inputs=replace(call.inputs, solver=object()))
    with pytest.raises(PlanError, match="the call's solver is object"):
        other.program(plan)


def test_guidance_follows_the_nodes():
    """A scale may differ from step to step, and skip-layer guidance is active at some."""
    scale, active = np.arange(64, dtype=np.float32), np.arange(64) % 3 == 0
    guidance = SkipLayer(ClassifierFree(scale), np.ones(4, bool), np.array(2.8, np.float32), active).at(
        np.array([0, 2, 3])
    )
    assert guidance.base.scale[:3].tolist() == [0, 2, 3] and not guidance.base.scale[3:].any()
    assert guidance.active[:3].tolist() == [True, False, True] and not guidance.active[3:].any()


class Linear:
    """A network whose velocity is -3 x: an error at a level grows by what the steps from there multiply x by."""

    def __init__(self, sigmas):
        self.factors = (1 - 3 * np.diff(sigmas)).astype(np.float32)

    def step(self, x, step):
        return self.factors[step] * x, -3 * x


def test_growth_is_that_of_the_flow(no_shape_checks):
    sigmas = np.linspace(1, 0, 11) ** 2
    runs, latents, velocities = Linear(sigmas), [np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)], []
    for step in range(10):
        after, velocity = runs.step(latents[-1], step)
        latents.append(after)
        velocities.append(velocity)
    dense = of_steps.Trajectory(np.stack(latents), np.stack(velocities))
    grown, off = of_steps.growth(runs, dense, sigmas)
    want = np.append(np.cumprod(runs.factors[::-1])[::-1] ** 2, 1)
    np.testing.assert_allclose(grown[2:], want[2:], rtol=1e-3)  # it begins at the third level
    assert grown[:2].tolist() == [grown[2]] * 2
    started = of_steps.mean_square(off - dense.latents[-1]) / want[2]
    assert started == pytest.approx(of_steps.PERTURBATION**2, rel=1e-3)


@pytest.mark.parametrize("first", [2, 5, 8])
def test_a_promise_has_a_margin(first, no_shape_checks, caplog):
    """Plans have a PSNR of 20 dB and 3 for each node: 7 nodes for 38 dB, wherever the search begins."""

    class Plans(of_steps.StepPlans):
        unfitted = (UnfittedRun(predicted_error=1.0, measured_psnr=0.0),)  # promises 0 dB of an error of 1

        def fitted(self, count):
            fits.append(count)
            record = SimpleNamespace(psnr=20.0 + 3 * count, predicted_error=1.0, target=self.facts["target"])
            record.check_of_every_step = partial(StepCalibration.check_of_every_step, record)
            return SimpleNamespace(nodes=range(count), step_calibration=record)

    def guess(psnr, predicted):
        """Before the first run, any number; then by that run's PSNR, one node to 3 dB."""
        assert predicted(1.0) == 0
        count = fits[-1] + int(np.ceil(psnr / 3)) if fits else first
        return SimpleNamespace(steps=range(min(max(count, 1), 9)))

    search = SimpleNamespace(num_steps=9, paths=range(1, 10), nodes=lambda count: count, for_psnr=guess)
    runs = SimpleNamespace(journal=Journal(None, ""))
    plans, fits = Plans(runs, {"target": "dense"}, None, search, None), []
    assert len(plans.for_psnr(38.0).nodes) == 7 and len(fits) <= 3 and not caplog.text
    fits.clear()
    assert len(plans.for_psnr(99.0).nodes) == 9, "every step is the dense run"
    assert "no plan of fewer steps promises psnr=99" in caplog.text
    fits.clear()
    with pytest.raises(ValueError, match="psnr=99.0 to the limit is more than 9 steps can promise, 44.0 dB"):
        Plans(runs, {"target": "converged"}, None, search, None).for_psnr(99.0)
