"""Sigmas and noise against diffusers and torch."""

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dfa2_jax.families.flux.config import FluxConfig
from dfa2_jax.families.flux.family import Flux
from dfa2_jax.families.sd3.config import SD3Config
from dfa2_jax.families.sd3.family import SD3
from dfa2_jax.families.sd3.transformer import PositionTable
from dfa2_jax.sampling.noise import torch_randn
from dfa2_jax.sampling.sinusoid import embedded_scalar, sinusoid
from dfa2_jax.sampling.solvers.flow_euler import flow_match_sigmas

SD3_SCHEDULER = {"shift": 3.0}
FLUX_DEV = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
FLUX_SCHNELL = {"shift": 1.0}
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def diffusers_sigmas(config, sigmas, num_visual, max_shift=1.15):
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)  # which keeps sigma_min and sigma_max
    mu = calculate_shift(num_visual, max_shift=max_shift) if config.get("use_dynamic_shifting") else None
    steps = {"num_inference_steps": sigmas} if isinstance(sigmas, int) else {"sigmas": sigmas}
    scheduler.set_timesteps(mu=mu, **steps)
    assert scheduler.sigmas.dtype == torch.float32
    return scheduler


@pytest.mark.torch
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50, 64])
@pytest.mark.parametrize("config", [SD3_SCHEDULER, FLUX_DEV, FLUX_SCHNELL], ids=["sd3", "dev", "schnell"])
@pytest.mark.parametrize("given_sigmas", [False, True])
def test_sigmas_equal_diffusers(config, steps, given_sigmas):
    sigmas = np.linspace(1.0, 1 / steps, steps) if given_sigmas else steps
    for num_visual in (64, 1024, 4096, 16384):
        theirs = diffusers_sigmas(config, sigmas, num_visual).sigmas.numpy()
        np.testing.assert_allclose(flow_match_sigmas(config, sigmas, num_visual), theirs, rtol=1.2e-7, atol=0)


@pytest.mark.torch
@pytest.mark.parametrize("more", [{}, {"shift_terminal": 0.1}, {"sigma_min": 0.02, "sigma_max": 0.9}], ids=str)
@pytest.mark.parametrize("spacing", [*SPACINGS, "use_dynamic_shifting"])
@pytest.mark.parametrize("config", [SD3_SCHEDULER, FLUX_DEV, FLUX_DEV | {"time_shift_type": "linear"}], ids=str)
def test_spaced_sigmas_equal_diffusers(config, spacing, more):
    config = config | more | {spacing: True}
    for steps in (1, 2, 4, 28, 50, 64):
        if steps == 1 and "shift_terminal" in config:
            continue  # diffusers makes NaN
        for sigmas in (steps, np.linspace(1.0, 1 / steps, steps)):
            for num_visual in (64, 4096):
                theirs = diffusers_sigmas(config, sigmas, num_visual).sigmas.numpy()
                np.testing.assert_allclose(flow_match_sigmas(config, sigmas, num_visual), theirs, rtol=1.2e-7, atol=0)


@pytest.mark.torch
@pytest.mark.parametrize("base_shift", [0, 0.0, -0.5])
def test_shifts_of_any_sign_are_those_of_diffusers(base_shift):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config, even = FLUX_DEV | {"base_shift": base_shift}, np.linspace(1.0, 1 / 6, 6)
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=even, mu=calculate_shift(1024, base_shift=base_shift))
    np.testing.assert_allclose(flow_match_sigmas(config, even, 1024), scheduler.sigmas.numpy(), rtol=2e-7)


def test_a_linear_shift_that_is_not_positive_is_refused():
    config = FLUX_DEV | {"base_shift": -5.0, "time_shift_type": "linear"}
    with pytest.raises(ValueError, match="a linear shift of .* at 1024 tokens is not positive"):
        flow_match_sigmas(config, 4, 1024)


@pytest.mark.torch
def test_known_values():
    """models of the schedule that published pipelines use, to four digits."""
    sd3 = flow_match_sigmas(SD3_SCHEDULER, 28, 4096)
    np.testing.assert_allclose(sd3[[0, 1, 2, 26, 27, 28]], [1, 0.9874, 0.9741, 0.1109, 0.00893, 0], atol=5e-5)
    flux = Flux(FluxConfig.from_json({}), FLUX_SCHNELL, nnx.Module())
    np.testing.assert_allclose(flux.schedule(FLUX_SCHNELL, None, 4, 4096, np.float32).sigmas, [1, 0.75, 0.5, 0.25, 0])
    dev = Flux(FluxConfig.from_json({"guidance_embeds": True}), FLUX_DEV, nnx.Module())
    sigmas = dev.schedule(FLUX_DEV, None, 28, 16384, np.float32).sigmas
    assert abs(sigmas[-2] - 0.484) < 5e-4  # mu 3.23 at 2048 px is not clamped


@pytest.mark.torch
def test_sd3_dynamic_shift_defaults_to_its_own_maximum():
    """diffusers' SD3 pipeline falls back to max_shift 1.16 where FLUX's has 1.15."""
    config = {"use_dynamic_shifting": True}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}
    widths = {"joint_attention_dim": 32, "pooled_projection_dim": 8, "pos_embed_max_size": 4, "num_layers": 1}
    transformer = nnx.Module()
    transformer.pos_embed = PositionTable(np.zeros((16, 32), np.float32))
    model = SD3(SD3Config.from_json(heads | widths), config, transformer)
    theirs = diffusers_sigmas(config, 10, 4096, max_shift=1.16).sigmas.numpy()
    np.testing.assert_allclose(model.schedule(config, None, 10, 4096, np.float32).sigmas, theirs, rtol=1.2e-7)


@pytest.mark.parametrize(
    ("config", "sigmas", "message"),
    [
        ({"invert_sigmas": True}, 4, r"\['invert_sigmas'\]"),
        ({"stochastic_sampling": True}, 4, r"\['stochastic_sampling'\]"),
        (dict.fromkeys(SPACINGS[1:], True), 4, r"\['use_exponential_sigmas', 'use_beta_sigmas'\], which exclude each"),
        ({"shift_terminal": 0.1}, 1, "shift_terminal=0.1 cannot end noise levels .* 2 steps or more"),
        ({"shift_terminal": 1}, 4, "shift_terminal=1 cannot"),
        ({"shift_terminal": "x"}, 4, "shift_terminal='x' is not a positive"),
        ({"shift_terminal": 0.5}, [0.1, 0.9], "shift_terminal=0.5 cannot"),
        ({"use_beta_sigmas": True, "sigma_min": 0.9, "sigma_max": 0.5}, 4, "sigmas from 0.5 to 0.9 do not fall"),
        ({"use_beta_sigmas": True, "sigma_max": 14.6}, 4, "sigmas from 14.6 to .* do not fall from 1 or below"),
        ({"use_dynamic_shifting": True, "time_shift_type": "cubic"}, 4, "cubic"),
        ({}, [1.0, 0.0], r"\(0, 1\]"),
        ({}, [], r"\(0, 1\]"),
        ({}, [1.5], "1.5"),
    ],
)
def test_unsupported_schedules_are_refused(config, sigmas, message):
    with pytest.raises(ValueError, match=message):
        flow_match_sigmas(config, sigmas, 64)


@pytest.mark.torch
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), size=st.integers(16, 3000))
def test_noise_equals_torch(seed, size):
    import torch

    theirs = torch.randn(size, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_allclose(torch_randn(seed, (size,)), theirs, atol=1e-6, rtol=0)


def test_noise_of_a_shape_and_bad_seeds():
    noise = torch_randn(3, (2, 16, 8, 10))
    assert noise.shape == (2, 16, 8, 10) and noise.dtype == np.float32
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    with pytest.raises(ValueError, match="seed=-1"):
        torch_randn(-1, (32,))
    with pytest.raises(ValueError, match=r"shape=\(3,\)"):
        torch_randn(0, (3,))


@pytest.mark.torch
def test_sinusoid_equals_diffusers():
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.concatenate([np.linspace(0, 1000, 57), [3500.0, 859.375]]).astype(np.float32)
    theirs = get_timestep_embedding(torch.tensor(t), 256, flip_sin_to_cos=True, downscale_freq_shift=0).numpy()
    difference = np.abs(sinusoid(t) - theirs)
    # torch's float32 exp is an ulp off for some frequencies; which ones depends on the CPU. 0.9 % of the values
    # seen differ, by up to an ulp of the angle (2.4e-4 at 3500). Float64 frequencies or angles move 15 to 25 % of them.
    assert difference.max() < 2.5e-4
    assert np.mean(difference > 1e-6) < 0.03


def test_embedded_scalar_rounds_as_torch_does():
    import ml_dtypes

    values = np.array([3.5, 0.85769], np.float32)
    np.testing.assert_array_equal(embedded_scalar(values, ml_dtypes.bfloat16), [3504, 860])  # torch's, measured
    np.testing.assert_allclose(embedded_scalar(values), [3500, 857.69], rtol=1e-7)
