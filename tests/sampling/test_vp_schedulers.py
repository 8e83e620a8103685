"""The schedulers of CogVideoX against diffusers: noise levels, solvers, noise and guidance."""

import ast
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline_cases import error

from dfa2_jax.plan.steps import euler_coefficients
from dfa2_jax.sampling.guidance import ClassifierFree
from dfa2_jax.sampling.loop import State
from dfa2_jax.sampling.noise import TorchNoise, torch_randn
from dfa2_jax.sampling.solvers.base import Solver
from dfa2_jax.sampling.solvers.cogvideox_dpm import CogVideoXDPM
from dfa2_jax.sampling.solvers.ddim import ScaledMultistep
from dfa2_jax.sampling.solvers.flow_euler import FlowMultistep
from dfa2_jax.sampling.solvers.schedulers import (
    VP_DDIM,
    VP_DPM,
    VP_SCHEDULERS,
    check_settings,
    check_vp_scheduler,
    named_config,
    vp_steps,
)
from dfa2_jax.sampling.solvers.variance_preserving import alpha_steps, alphas_cumprod, timesteps_of

V = {"prediction_type": "v_prediction", "clip_sample": False}
COG_2B = V | {"_class_name": VP_DDIM, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CONFIGS = {
    "2b": COG_2B | {"snr_shift_scale": 3.0},
    "5b": COG_2B | {"snr_shift_scale": 1.0},
    "leading": COG_2B | {"timestep_spacing": "leading", "steps_offset": 1},
    "leading, no zero signal": V | {"snr_shift_scale": 1.0, "set_alpha_to_one": False},
    "linspace": COG_2B | {"timestep_spacing": "linspace", "snr_shift_scale": 1.0},
    "linear": COG_2B | {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
}
SHAPE = 1, 24, 8
STEPS = [6, 7, 28, 50]
OLD_NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""diffusers makes arrays of tensors."""


def theirs(name, config, steps):
    import diffusers

    scheduler = getattr(diffusers, name).from_config(config | {"_class_name": name})
    scheduler.set_timesteps(steps)
    return scheduler


def linear_model():
    """v = x M + offset, as no model is: latents stay of the size of noise."""
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(SHAPE[2], SHAPE[2])) / SHAPE[2] ** 0.5 * 0.7
    return matrix.astype(np.float32), generator.normal(size=SHAPE).astype(np.float32)


def sampled_by_diffusers(name, config, steps, seed):
    import torch

    scheduler, generator = theirs(name, config, steps), torch.Generator().manual_seed(seed)
    matrix, offset = map(torch.tensor, linear_model())
    x, clean = torch.randn(SHAPE, generator=generator), None
    for i, time in enumerate(scheduler.timesteps):
        v = x @ matrix + offset
        if name == VP_DDIM:
            x = scheduler.step(v, time, x, return_dict=False)[0]
        else:
            before = scheduler.timesteps[i - 1] if i else None
            x, clean = scheduler.step(v, clean, time, before, x, generator=generator)
    return x.numpy()


@jax.jit
def step_of(solver, x, v, i, state):
    return solver.step(x, v, i, state)


def sampled(config, steps, seed):
    stream, (matrix, offset) = TorchNoise(seed), linear_model()
    _, _, solver = vp_steps(config, None, steps)
    x = stream.randn(SHAPE)
    state = State(x, solver.init(x))
    for i in range(steps):
        if isinstance(solver, CogVideoXDPM):
            noise = [stream.randn(SHAPE) for _ in range(solver.draws[i])][-1]
            state = replace(state, solver=solver.with_noise(state.solver, noise))
        x = np.asarray(state.latents)
        state = State(*step_of(solver, x, x @ matrix + offset, i, state.solver))
    return np.asarray(state.latents)


@OLD_NUMPY
@pytest.mark.torch
@pytest.mark.parametrize("config", CONFIGS)
def test_alphas_and_timesteps_equal_diffusers(config):
    exact = 1.2e-7 if config == "linear" else 1e-12  # diffusers' linear betas are of float32
    for steps in (*STEPS, 1, 2, 30, 333, 1000):
        if "leading" in config and steps == 1000 and CONFIGS[config].get("steps_offset"):
            continue
        scheduler = theirs(VP_DDIM, CONFIGS[config], steps)
        np.testing.assert_allclose(alphas_cumprod(CONFIGS[config]), scheduler.alphas_cumprod, atol=exact, rtol=exact)
        np.testing.assert_array_equal(timesteps_of(CONFIGS[config], steps), scheduler.timesteps)


@OLD_NUMPY
@pytest.mark.torch
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_samples_equal_diffusers(name, config, steps):
    made = sampled(CONFIGS[config] | {"_class_name": name}, steps, 11)
    want = sampled_by_diffusers(name, CONFIGS[config], steps, 11)
    assert np.isfinite(want).all() and error(made, want) < 1e-6


def test_levels_fall_from_pure_noise_and_are_those_of_the_latents():
    config = CONFIGS["2b"]
    levels, timesteps, solver = vp_steps(config, None, 50)
    assert levels.dtype == np.float32 and levels.shape == (51,) and timesteps[0] == 999
    assert levels[0] == 1 and levels[-1] == 0 and (np.diff(levels) < 0).all()
    noise, clean = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    alphas = alpha_steps(config, 50).now
    x, v = (
        np.float32(alphas[20] ** 0.5) * first + np.float32((1 - alphas[20]) ** 0.5) * second
        for first, second in ((clean, noise), (noise, -clean))
    )
    _, velocity = solver.step(x, v, 20, solver.init(x))
    assert error(np.asarray(velocity), noise - clean) < 1e-6
    scaled = x / np.float32(alphas[20] ** 0.5 + (1 - alphas[20]) ** 0.5)
    assert error(scaled, (1 - levels[20]) * clean + levels[20] * noise) < 1e-6


def test_a_step_plan_moves_scaled_latents():
    """With the true velocity of one image, any coefficients that sum to the move reach its noise levels."""
    levels, _, dense = vp_steps(CONFIGS["2b"], None, 50)
    euler = ScaledMultistep.planned(levels, euler_coefficients(levels))
    np.testing.assert_allclose(euler.coefficients, dense.coefficients, rtol=2e-5, atol=2e-7)
    nodes = np.array([0, 10, 30, 44])
    sigmas = np.append(levels[nodes], levels[-1]).astype(np.float64)
    moves = np.diff(sigmas)
    split = np.stack([1.5 * moves, -0.5 * moves], axis=1)
    split[0] = moves[0], 0
    solver = ScaledMultistep.planned(sigmas, split)
    noise, clean = np.random.default_rng(2).normal(size=(2, *SHAPE)).astype(np.float32)
    scale = 1 / np.hypot(sigmas, 1 - sigmas)
    c, s = ((scale * part).astype(np.float32) for part in (1 - sigmas, sigmas))
    x = noise
    state = solver.init(x)
    for i in range(len(nodes)):
        assert error(np.asarray(x), c[i] * clean + s[i] * noise) < 1e-6
        x, state = solver.step(x, c[i] * noise - s[i] * clean, i, state)
    assert error(np.asarray(x), clean) < 1e-6
    with pytest.raises(ValueError, match="5 noise levels and 3 steps"):
        ScaledMultistep.planned(sigmas, split[1:])


def test_scaled_steps_are_flow_matchings_own():
    generator, sigmas = np.random.default_rng(3), np.array([1.0, 0.7, 0.4, 0.1])
    moves = generator.normal(size=(3, 2))
    scaled, flow = ScaledMultistep.planned(sigmas, moves), FlowMultistep.moving(moves)
    x = y = generator.normal(size=SHAPE).astype(np.float32)  # the scale of pure noise is 1
    states = scaled.init(x), flow.init(y)
    for i, sigma in enumerate(sigmas[:-1]):
        v = generator.normal(size=SHAPE).astype(np.float32)
        scale = np.float32(1 / np.hypot(sigma, 1 - sigma))
        velocity = np.float32(2 * sigma - 1) * scale * np.asarray(x) + scale * v
        (x, first), (y, second) = scaled.step(x, v, i, states[0]), flow.step(y, velocity, i, states[1])
        states = first, second
    assert error(np.asarray(x) * np.float32(np.hypot(0.1, 0.9)), np.asarray(y)) < 1e-6


@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_step_counts_and_noise_are_data(name, compilations):
    x = jnp.ones(SHAPE)
    step_of.clear_cache()
    compilations.clear()
    for steps, i in ((6, 0), (50, 0), (50, 30), (28, 27)):
        solver = vp_steps(CONFIGS["2b"] | {"_class_name": name}, None, steps)[2]
        assert isinstance(solver, Solver)
        state = solver.init(np.asarray(x))
        carried = jax.eval_shape(solver.step, x, x, 0, state)  # a loop must carry what it is given
        assert carried == jax.eval_shape(lambda carry: carry, (x, state))
        if name == VP_DPM:
            state = solver.with_noise(state, TorchNoise(i).randn(SHAPE))
        step_of(solver, x, x, i, state)
    assert len(compilations) == 1


def test_draws_of_each_step():
    draws = vp_steps(CONFIGS["2b"] | {"_class_name": VP_DPM}, None, 50)[2].draws
    assert draws == (1, *[2] * 48, 1, *[0] * 14)  # padded to 64
    assert vp_steps(CONFIGS["2b"] | {"_class_name": VP_DPM}, None, 28)[2].draws[:28] == (1, *[2] * 27)


@pytest.mark.torch
def test_draws_go_on_with_the_stream_of_torch():
    import torch

    generator, stream = torch.Generator().manual_seed(2**40 + 5), TorchNoise(2**40 + 5)
    for number, shape in enumerate([(1, 3, 4, 6, 8), (5, 7), (17,), (16,), (2, 31), (1, 3, 4, 6, 8)]):
        noise = stream.randn(shape)
        assert noise.shape == shape and noise.dtype == np.float32
        np.testing.assert_allclose(noise, torch.randn(shape, generator=generator).numpy(), atol=1e-6, rtol=0)
        assert number or (noise == torch_randn(2**40 + 5, shape)).all()
    with pytest.raises(ValueError, match="must hold 16 numbers"):
        stream.randn((15,))


@pytest.mark.torch
def test_dynamic_guidance_is_that_of_the_pipeline():
    """Its formula is a line of diffusers' pipeline, which runs here on its own."""
    import inspect
    import textwrap

    import torch
    from diffusers import CogVideoXPipeline

    tree = ast.parse(textwrap.dedent(inspect.getsource(CogVideoXPipeline.__call__)))
    lines = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "use_dynamic_cfg"
    ]
    code = compile(ast.Module(lines[0].body, []), "diffusers", "exec")
    for steps in (7, 50):
        timesteps, want = timesteps_of(CONFIGS["2b"], steps), []
        for time in timesteps:
            names = {"self": SimpleNamespace(), "math": math, "t": torch.tensor(time)}
            exec(code, names | {"guidance_scale": 6.0, "num_inference_steps": steps})
            want.append(names["self"]._guidance_scale)
        scales = np.asarray(ClassifierFree.dynamic(6.0, timesteps, steps).scale)
        np.testing.assert_array_equal(scales[:steps], np.float32(want))
        assert scales.shape == (64,) and 1 <= min(want) < 2 and 6 < max(want) <= 7


@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_a_number_of_steps_that_leaves_noise_is_told_once(name, caplog):
    config = CONFIGS["2b"] | {"_class_name": name}
    with caplog.at_level(logging.WARNING, "dfa2_jax"):
        check_vp_scheduler(config)
        vp_steps(config, None, 50)
        assert caplog.messages == []
        levels, _, _ = vp_steps(config, None, 28)
    assert levels[-1] > 0.01
    [message] = caplog.messages
    assert "num_inference_steps=28: the last step leaves noise of level 0.0" in message
    assert "27 steps lead to the end" in message and vp_steps(config, None, 27)[0][-1] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon' is not supported: only 'v_prediction' is"),
        ({"thresholding": True}, "thresholding=True is not supported: only False is"),
        ({"trained_betas": [0.1]}, r"trained_betas=\[0.1\] is not supported: only None is"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2' is not supported: only 'scaled_"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras' is not supported: only 'linspace' or"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one=1 is not supported: only True or False is"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr='yes' is not supported"),
        ({"snr_shift_scale": 0}, "snr_shift_scale=0 is not a positive number"),
        ({"beta_end": 1.5}, "beta_end=1.5 is not below 1"),
        ({"beta_start": "x"}, "beta_start='x' is not a positive number"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps=1000.0 is not a whole number from 2 to 10000"),
        ({"timestep_spacing": "leading", "steps_offset": -1}, "steps_offset=-1 is not a whole number"),
        ({"timestep_spacing": "leading", "steps_offset": 600}, "timesteps from 1100 to 600 of 2 steps, and training"),
        ({"_class_name": "DDIMScheduler"}, "scheduler 'DDIMScheduler' is not supported: CogVideoXDDIMScheduler and"),
    ],
)
def test_what_is_not_implemented_is_refused(changed, message):
    check_vp_scheduler(CONFIGS["2b"])
    with pytest.raises(ValueError, match=message):
        check_vp_scheduler(CONFIGS["2b"] | changed)


def test_a_silent_config_is_of_another_prediction():
    with pytest.raises(ValueError, match="scheduler_config.json: prediction_type='epsilon'"):
        check_vp_scheduler({"_class_name": VP_DDIM})


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "0 steps: scheduler_config.json has num_train_timesteps=1000. Take 1 to 1000"),
        (1001, "1001 steps: scheduler_config.json has num_train_timesteps=1000"),
        (61, "timestep_spacing='trailing' makes 62 timesteps from 999 to -1 of 61 steps"),
    ],
)
def test_numbers_of_steps_that_it_has_not_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        vp_steps(CONFIGS["2b"], None, steps)


def test_own_sigmas_are_refused():
    with pytest.raises(ValueError, match="CogVideoXDDIMScheduler makes its own. Pass num_inference_steps"):
        vp_steps(CONFIGS["2b"], [1.0, 0.5], 2)


@pytest.mark.torch
@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_a_name_alone_is_from_config_of_model_cards(name):
    import diffusers

    own = CONFIGS["leading"] | {"snr_shift_scale": 2.0, "_class_name": next(n for n in VP_SCHEDULERS if n != name)}
    want = dict(getattr(diffusers, name).from_config(own, timestep_spacing="trailing").config)
    made = named_config(name, own)
    assert made["_class_name"] == name and made.items() <= want.items()
    check_vp_scheduler(made)
    check_settings(dict(getattr(diffusers, name)().config) | {"_class_name": name, "_any": 1})
    with pytest.raises(ValueError, match="'snr_shift' is no setting of a scheduler: did you mean 'snr_shift_scale'"):
        check_settings(made | {"snr_shift": 1.0})


@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_image_models_refuse_them(name, pipelines):
    with pytest.raises(ValueError, match="is none of this model's: FlowMatchEulerDiscreteScheduler and"):
        pipelines("tiny_sd35")("a fox", scheduler=name)
