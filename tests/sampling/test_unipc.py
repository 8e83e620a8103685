"""UniPC against diffusers."""

import json

import numpy as np
import pytest
from pipeline_cases import PROMPTS, error, load_theirs, run_theirs

from dfa2_jax import Plan, PlanError
from dfa2_jax.sampling.solvers.schedulers import DPM, EULER, UNIPC, flow_steps, named_config

SD3 = named_config(UNIPC, {"_class_name": EULER, "shift": 3.0})
DEV = named_config(UNIPC, {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15})
CALL = {"height": 64, "width": 64, "max_sequence_length": 16, "output_type": "latent"}
CASES = {"tiny_sd35": {"guidance_scale": 3.0}, "tiny_flux_dev": {}}


@pytest.mark.torch
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 20, 64])
@pytest.mark.parametrize("config", [SD3, DEV, SD3 | {"shift_terminal": 0.1}], ids=["sd3", "dev", "terminal"])
def test_levels_and_steps_equal_diffusers(config, steps):
    import torch
    from diffusers import UniPCMultistepScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    if steps == 1 and "shift_terminal" in config:
        return  # diffusers makes NaN
    generator = np.random.default_rng(steps)
    for num_visual in (1024, 4096):
        theirs = UniPCMultistepScheduler.from_config(config)
        theirs.set_timesteps(steps, mu=calculate_shift(num_visual))
        levels, times, solver = flow_steps(config, None, steps, num_visual)
        np.testing.assert_allclose(levels, theirs.sigmas.numpy(), rtol=1.2e-7, atol=0)
        np.testing.assert_array_equal(times, theirs.timesteps.numpy())
        x = y = generator.normal(size=(1, 8, 4)).astype(np.float32)
        state = solver.init(x)
        for i in range(steps):
            velocity = generator.normal(size=x.shape).astype(np.float32)
            x, state = solver.step(x, velocity, i, state)
            y = theirs.step(torch.tensor(velocity), theirs.timesteps[i], torch.tensor(y)).prev_sample.numpy()
        assert error(np.asarray(x), y) < 5e-6  # phi functions, which they take in float32


@pytest.mark.torch
@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("name", CASES)
def test_latents_equal_diffusers(name, steps, pipelines, request):
    from diffusers import UniPCMultistepScheduler

    theirs = load_theirs(request.getfixturevalue(name))
    own = theirs.scheduler.config
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": own.shift}
    theirs.scheduler = UniPCMultistepScheduler.from_config(own, **flow)
    want = run_theirs(theirs, 5, prompt=PROMPTS[0], **CALL, **CASES[name], num_inference_steps=steps)
    options = CALL | CASES[name] | {"prompt": PROMPTS[0], "seed": 5, "progress": False, "num_inference_steps": steps}
    made = pipelines(name)(**options, scheduler=UNIPC)
    assert error(made.images, want) < 1e-5
    config = json.loads(json.dumps(dict(theirs.scheduler.config))) | {"_class_name": UNIPC}
    np.testing.assert_array_equal(pipelines(name)(**options, scheduler=config).images, made.images)
    assert error(pipelines(name)(**options, scheduler=DPM).images, want) > 1e-3


def test_a_name_takes_the_shift_and_its_own_solver_type():
    assert named_config(UNIPC, named_config(DPM, SD3)) == SD3
    assert named_config(EULER, DEV)["shift"] == 3.0


def test_a_plan_of_heads_goes_with_it_and_one_of_steps_does_not(pipelines):
    pipeline = pipelines("tiny_sd35")
    options = {**CALL, **CASES["tiny_sd35"], "num_inference_steps": 6}
    full = Plan.full(pipeline.setting(prompt=PROMPTS[0], **options, scheduler=UNIPC))
    call = {"guidance_scale": 3.0, "output_type": "latent", "progress": False}
    dense = pipeline(PROMPTS[0], **options, scheduler=UNIPC, progress=False)
    np.testing.assert_array_equal(pipeline(PROMPTS[0], plan=full, **call).images, dense.images)
    with pytest.raises(PlanError, match="the call's solver is FlowUniPC"):
        pipeline(PROMPTS[0], plan=Plan.full(full.setting, (0, 2, 4)), **call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver_order": 3}, "solver_order=3 is not supported"),
        ({"solver_type": "bh1"}, "solver_type='bh1' is not supported"),
        ({"disable_corrector": [0]}, r"disable_corrector=\[0\] is not supported"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True is not supported"),
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon' is not supported"),
        ({"num_train_timesteps": 1}, "do not fall from below 1"),
    ],
)
def test_others_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        flow_steps(SD3 | change, None, 6, 4096)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler makes its own"):
        flow_steps(SD3, [1.0, 0.5], 6, 4096)
