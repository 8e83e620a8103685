"""Steps of CogVideoX with torch's roundings: diffusers' 16-bit latents from the same predictions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pipeline_cases import error

from dfa2_jax.families.cogvideox.config import CogVideoXConfig
from dfa2_jax.families.cogvideox.family import CogVideoX
from dfa2_jax.nn.attention import Dense
from dfa2_jax.options import Options
from dfa2_jax.sampling.inputs import Inputs, pad_steps
from dfa2_jax.sampling.loop import State, denoise_step, rounding_to
from dfa2_jax.sampling.noise import TorchNoise
from dfa2_jax.sampling.solvers.cogvideox_dpm import CogVideoXDPM
from dfa2_jax.sampling.solvers.schedulers import VP_DDIM, VP_SCHEDULERS

SHAPE, SCALE, SEED = (1, 96, 16), 6.0, 5
CONFIG = {"prediction_type": "v_prediction", "clip_sample": False, "snr_shift_scale": 1.0}
CONFIG |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


class Predicts(nnx.Module):
    """A transformer whose predictions, of both sides of guidance, are given: at step `timestep`."""

    def __init__(self, predictions):
        self.predictions = nnx.Variable(predictions)

    def __call__(self, x, timestep, conditions, attend, *, memory, plans, unroll):
        return jnp.asarray(self.predictions[...])[timestep[0, 0].astype(jnp.int32)], memory


def predictions_of(steps, dtype):
    """Those that a model makes in the dtype, as float32."""
    drawn = np.random.default_rng(0).standard_normal((steps, 2, *SHAPE[1:])).astype(np.float32)
    return drawn.astype(dtype).astype(np.float32)


def as_on_gpus():
    """Makes products on a CPU those of a GPU, whose kernels keep a coefficient in float32.

    torch's CPU kernels do so where the coefficient is the second factor, and round a first factor to the other's dtype.
    """
    import torch

    class CoefficientsLast(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.mul and isinstance(args[1], torch.Tensor) and args[0].ndim == 0:
                args = args[::-1]
            return function(*args, **kwargs or {})

    return CoefficientsLast()


def by_diffusers(name, predictions, dtype):
    """The latents after each step, computed as its pipeline computes them."""
    import diffusers
    import torch

    scheduler = getattr(diffusers, name).from_config(CONFIG | {"_class_name": name})
    scheduler.set_timesteps(len(predictions))
    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(SEED)
    x, clean, seen = torch.randn(SHAPE, generator=generator, dtype=kind), None, []
    for i, time in enumerate(scheduler.timesteps):
        unconditional, conditional = torch.tensor(predictions[i]).chunk(2)
        prediction = unconditional + SCALE * (conditional - unconditional)
        with as_on_gpus():
            if name == VP_DDIM:
                x = scheduler.step(prediction, time, x, return_dict=False)[0]
            else:
                before = scheduler.timesteps[i - 1] if i else None
                x, clean = scheduler.step(prediction, clean, time, before, x, generator=generator)
        x = x.to(kind)
        seen.append(x.float().numpy())
    return seen


def by_us(name, predictions, rounding):
    steps, stream = len(predictions), TorchNoise(SEED)
    model = Predicts(predictions)
    family = CogVideoX(CogVideoXConfig.from_json({}), {}, model)
    schedule = family.schedule(CONFIG | {"_class_name": name}, None, steps, SHAPE[1], jnp.float32)
    guidance = family.guidance(Options(prompt=""), SCALE, schedule)
    inputs = Inputs(None, pad_steps(np.arange(steps, dtype=np.float32)[:, None]), guidance, schedule.solver)

    @jax.jit
    def step(i, state):
        return denoise_step(model, Dense(), inputs, i, state, {}, rounding=rounding)

    x, seen = np.asarray(rounding_to(rounding)(jnp.asarray(stream.randn(SHAPE)))), []
    state = State(x, schedule.solver.init(x))
    for i in range(steps):
        if isinstance(schedule.solver, CogVideoXDPM):
            noise = [stream.randn(SHAPE) for _ in range(schedule.solver.draws[i])][-1]
            state = replace(state, solver=schedule.solver.with_noise(state.solver, noise))
        state = step(i, state)
        seen.append(np.asarray(state.latents))
    return seen


@pytest.mark.torch
@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_roundings_are_those_of_torch(name, dtype, steps):
    """Nearly all latents are equal to the bit, after every step; without roundings they are not."""
    predictions = predictions_of(steps, dtype)
    want, rounded = by_diffusers(name, predictions, dtype), by_us(name, predictions, dtype)
    assert len(want) == steps and all(np.isfinite(x).all() for x in want)
    for ours, theirs in zip(rounded, want, strict=True):
        assert (ours == theirs).mean() > 0.99
    exact = by_us(name, predictions, None)
    assert error(rounded[-1], want[-1]) < 0.2 * error(exact[-1], want[-1])
