"""DPM-Solver++(2M) and the choice of a scheduler, against diffusers."""

import json

import numpy as np
import pytest
from pipeline_cases import PROMPTS, error, load_theirs, run_theirs

from dfa2_jax import Plan, PlanError, calibrate
from dfa2_jax.sampling.solvers.dpm_multistep import FlowDPM, dpm_levels
from dfa2_jax.sampling.solvers.schedulers import DPM, EULER, FLOW_SCHEDULERS, check_settings, named_config
from dfa2_jax.weights.checkpoint import CheckpointError

SD3 = named_config(DPM, {"_class_name": EULER, "shift": 3.0})
DEV = named_config(DPM, {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15})
CALL = {"height": 64, "width": 64, "num_inference_steps": 6, "max_sequence_length": 16, "output_type": "latent"}
OLD_NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""diffusers makes arrays of tensors."""

CASES = {"tiny_sd35": {"guidance_scale": 3.0}, "tiny_flux_dev": {}}


def diffusers_scheduler(config, steps, num_visual):
    from diffusers import DPMSolverMultistepScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(steps, mu=calculate_shift(num_visual) if config.get("use_dynamic_shifting") else None)
    return scheduler


@OLD_NUMPY
@pytest.mark.torch
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 64])
@pytest.mark.parametrize("config", [SD3, DEV], ids=["sd3", "dev"])
def test_levels_and_steps_equal_diffusers(config, steps):
    import torch

    generator = np.random.default_rng(steps)
    for num_visual in (1024, 4096):
        theirs = diffusers_scheduler(config, steps, num_visual)
        levels, times = dpm_levels(config, steps, num_visual)
        np.testing.assert_allclose(levels, theirs.sigmas.numpy(), rtol=2e-7)
        np.testing.assert_array_equal(times, theirs.timesteps.numpy())
        x = y = generator.normal(size=(1, 8, 4)).astype(np.float32)
        solver = FlowDPM.of(levels)
        state = solver.init(x)
        for i in range(steps):
            velocity = generator.normal(size=x.shape).astype(np.float32)
            x, state = solver.step(x, velocity, i, state)
            y = theirs.step(torch.tensor(velocity), theirs.timesteps[i], torch.tensor(y)).prev_sample.numpy()
        assert error(np.asarray(x), y) < 2e-5  # differences of logarithms, which they take in float32


@OLD_NUMPY
@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_latents_equal_diffusers(name, pipelines, request):
    from diffusers import DPMSolverMultistepScheduler

    theirs = load_theirs(request.getfixturevalue(name))
    own = theirs.scheduler.config
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": own.shift}
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(own, **flow)
    want = run_theirs(theirs, 5, prompt=PROMPTS[0], **CALL, **CASES[name])
    options = CALL | CASES[name] | {"prompt": PROMPTS[0], "seed": 5, "progress": False}
    made = pipelines(name)(**options, scheduler=DPM)
    assert error(made.images, want) < 1e-5
    config = json.loads(json.dumps(dict(theirs.scheduler.config))) | {"_class_name": DPM}
    np.testing.assert_array_equal(pipelines(name)(**options, scheduler=config).images, made.images)
    assert error(pipelines(name)(**options).images, want) > 1e-3


@pytest.mark.torch
def test_latents_by_beta_sigmas_equal_diffusers(pipelines, tiny_flux_dev):
    theirs = load_theirs(tiny_flux_dev)
    theirs.scheduler = theirs.scheduler.from_config(theirs.scheduler.config, use_beta_sigmas=True)
    want = run_theirs(theirs, 5, prompt=PROMPTS[0], **CALL)
    options = CALL | {"prompt": PROMPTS[0], "seed": 5, "progress": False}
    config = json.loads(json.dumps(dict(theirs.scheduler.config))) | {"_class_name": EULER}
    run = pipelines("tiny_flux_dev")
    assert error(run(**options, scheduler=config).images, want) < 1e-4
    assert error(run(**options).images, want) > 1e-3


def test_a_plan_of_one_schedule_is_refused_by_another(pipelines):
    pipeline = pipelines("tiny_flux_dev")
    config = dict(pipeline.scheduler) | {"use_beta_sigmas": True}
    plan = Plan.full(pipeline.setting(prompt=PROMPTS[0], **CALL, scheduler=config), (0, 2, 4))
    call = {"plan": plan, "output_type": "latent", "progress": False}
    assert pipeline(PROMPTS[0], scheduler=config, **call).metadata["num_nodes"] == 3
    for other in (None, EULER, config | {"use_beta_sigmas": False, "use_karras_sigmas": True}):
        with pytest.raises(PlanError, match="sigmas is .* in the plan and .* in the call: .*the scheduler's config"):
            pipeline(PROMPTS[0], scheduler=other, **call)


@OLD_NUMPY
@pytest.mark.torch
@pytest.mark.parametrize("scheduler", [EULER, DPM])
@pytest.mark.parametrize("name", CASES)
def test_callbacks_are_told_the_timesteps_of_diffusers(name, scheduler, pipelines, request):
    """DPM's are integers, below 1,000 sigma."""
    import diffusers

    theirs, told = load_theirs(request.getfixturevalue(name)), {"ours": [], "theirs": []}
    config = named_config(scheduler, dict(theirs.scheduler.config))
    theirs.scheduler = getattr(diffusers, scheduler).from_config(config)

    def watcher(whose):
        return lambda pipeline, step, timestep, values: told[whose].append(timestep) or values

    run_theirs(theirs, prompt=PROMPTS[0], **CALL, **CASES[name], callback_on_step_end=watcher("theirs"))
    options = CALL | CASES[name] | {"callback_on_step_end": watcher("ours"), "progress": False}
    pipelines(name)(PROMPTS[0], scheduler=scheduler, **options)
    want = [timestep.item() for timestep in told["theirs"]]
    assert told["ours"] == want and [*map(type, told["ours"])] == [*map(type, want)]


def test_steps_and_schedulers_are_data(pipelines, compilations):
    """A solver is a program; its levels and steps are not."""
    run = pipelines("tiny_sd35")
    options = CALL | {"guidance_scale": 3.0, "progress": False, "scheduler": DPM}
    run("a fox", **options)
    compilations.clear()
    run("a fox", **options | {"num_inference_steps": 9})
    run("a fox", **options | {"scheduler": SD3 | {"flow_shift": 2.0}})
    assert compilations == []


def test_a_plan_of_heads_goes_with_it_and_one_of_steps_does_not(pipelines):
    pipeline = pipelines("tiny_sd35")
    options = {**CALL, "scheduler": DPM, "guidance_scale": 3.0}
    full = Plan.full(pipeline.setting(prompt=PROMPTS[0], **options))
    assert full.setting.scheduler == DPM
    dense = pipeline(PROMPTS[0], **options, progress=False)
    by_plan = pipeline(PROMPTS[0], plan=full, guidance_scale=3.0, output_type="latent", progress=False)
    np.testing.assert_array_equal(by_plan.images, dense.images)  # the plan names the scheduler
    with pytest.raises(
        PlanError, match="leave it to the plan, or calibrate with this scheduler, by delta= where its steps are not"
    ):
        pipeline(PROMPTS[0], plan=full, scheduler=EULER, guidance_scale=3.0)
    with pytest.raises(PlanError, match="the call's solver is FlowDPM"):
        pipeline(PROMPTS[0], plan=Plan.full(full.setting, (0, 2, 4)), guidance_scale=3.0)
    arguments = {name: value for name, value in options.items() if name != "output_type"}
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler: a plan of steps moves x as Euler's"):
        calibrate(pipeline, PROMPTS, **arguments, speedup=2.0)
    plan = calibrate(pipeline, PROMPTS, **arguments, delta=0.5, progress=False)
    assert plan.setting.scheduler == DPM and plan.density() < 1


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("DDIMScheduler", "is none of this model's: FlowMatchEulerDiscreteScheduler and DPMSolverMultistepScheduler"),
        ({"shift": 3.0}, "is none of this model's"),
        (SD3 | {"use_flow_sigmas": False}, "use_flow_sigmas=False is not supported: only True is"),
        ({"_class_name": DPM}, "use_flow_sigmas=None is not supported"),
        (SD3 | {"solver_order": 3}, "solver_order=3 is not supported: only 2 is"),
        (SD3 | {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver\\+\\+' is not supported"),
        (SD3 | {"use_karras_sigmas": True}, "use_karras_sigmas=True is not supported"),
        (SD3 | {"flow_shift": 0}, "flow_shift=0 is not a positive number"),
        (SD3 | {"num_train_timesteps": 1}, "do not fall from below 1"),
        (SD3 | {"shfit": 3.0}, "'shfit' is no setting of a scheduler: did you mean 'shift'"),
        ({"_class_name": EULER, "zzz": 3.0}, "'zzz' is no setting of a scheduler: leave it out"),
        ({"_class_name": EULER, "invert_sigmas": True}, "sets \\['invert_sigmas'\\]"),
    ],
)
def test_other_schedulers_are_refused_before_any_work(scheduler, message, pipelines):
    with pytest.raises(ValueError, match=message):
        pipelines("tiny_sd35")("a fox", **CALL, scheduler=scheduler)


@pytest.mark.torch
def test_every_setting_of_diffusers_is_known():
    import diffusers

    for name in FLOW_SCHEDULERS:
        config = dict(getattr(diffusers, name)().config)
        assert len(config) > 10
        check_settings(config | {"_class_name": name, "_diffusers_version": "0.42.1", "_any": 1})


def test_own_sigmas_are_refused(pipelines):
    options = {name: value for name, value in CALL.items() if name != "num_inference_steps"}
    with pytest.raises(ValueError, match="makes its own. Pass num_inference_steps"):
        pipelines("tiny_sd35")("a fox", **options, scheduler=DPM, sigmas=[1.0, 0.5])


def test_a_folder_may_name_it(tiny_sd35, tmp_path, pipelines):
    from dfa2_jax import Pipeline

    folder = tmp_path / "sd35"
    folder.mkdir()
    for path in tiny_sd35.iterdir():
        if path.name not in ("scheduler", "model_index.json"):
            (folder / path.name).symlink_to(path)
    index = json.loads((tiny_sd35 / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", DPM]}))
    (folder / "scheduler").mkdir()
    own = json.loads((tiny_sd35 / "scheduler" / "scheduler_config.json").read_text())
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(named_config(DPM, own)))
    options = CALL | {"guidance_scale": 3.0, "progress": False}
    images = Pipeline.from_pretrained(folder)("a fox", **options).images
    np.testing.assert_array_equal(images, pipelines("tiny_sd35")("a fox", **options, scheduler=DPM).images)
    file.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(CheckpointError, match="scheduler 'DDIMScheduler' is not supported"):
        Pipeline.from_pretrained(folder)


def test_metadata_say_the_scheduler(pipelines):
    from dfa2_jax.pipeline.output import options_again, parameters

    options = CALL | {"guidance_scale": 3.0, "progress": False, "scheduler": SD3}
    made = json.loads(json.dumps(pipelines("tiny_sd35")("a fox", **options).metadata))
    assert "Sampler: DPM++ 2M" in parameters(made) and options_again(made, None).scheduler == SD3
    plain = pipelines("tiny_sd35")("a fox", **options | {"scheduler": None}).metadata
    assert plain["scheduler"] == EULER and "Sampler: Euler" in parameters(plain)
