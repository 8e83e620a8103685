"""Schemes that plans are compared with."""

import numpy as np
import pytest

from dfa2_jax import Plan
from dfa2_jax.calibration.baselines import (
    CACHE,
    IN_FULL,
    SCHEMES,
    Option,
    Scheme,
    SchemeChoices,
    calibrate_scheme,
    sample_scheme,
)
from dfa2_jax.plan.method import Method
from pallas_kernels import Layout

ARGUMENTS = {
    "prompt": "a large red circle", "height": 96, "width": 128, "num_inference_steps": 3, "max_sequence_length": 24,
    "seed": 1, "output_type": "latent",
}  # fmt: skip
GUIDED = {"guidance_scale": 4.0}


@pytest.fixture(scope="module")
def sd35(pipelines):
    return pipelines("tiny_sd35")


def choice(pipeline, options, pick):
    """This pick for every head of every layer after the first step."""
    setting = pipeline.setting(**ARGUMENTS | GUIDED)
    shape = setting.num_inference_steps, len(setting.layers), setting.num_heads
    picks = np.full(shape, IN_FULL, np.int32)
    picks[1:] = pick
    return SchemeChoices(options, picks, tuple(layer.layout for layer in setting.layers))


def plan_of(shared, setting):
    methods = (Method("full"), *(option.method for option in shared.options))
    return Plan(setting, methods, (shared.picks + 1).astype(np.uint8))


@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_dev"])
def test_heads_that_share_as_plans_do_give_the_plan_s_latents(name, pipelines):
    pipeline = pipelines(name)
    options = (CACHE, Option(Method.arrow(4)), Option(Method.arrow(16)))
    setting = pipeline.setting(**ARGUMENTS)
    shape = setting.num_inference_steps, len(setting.layers), setting.num_heads
    picks = np.random.default_rng(0).integers(-1, 3, shape, dtype=np.int32)
    picks[0] = IN_FULL
    shared = SchemeChoices(options, picks, tuple(layer.layout for layer in setting.layers))
    plan = plan_of(shared, setting)
    want = pipeline(**ARGUMENTS, plan=plan, progress=False).images
    got = sample_scheme(pipeline, shared, **ARGUMENTS)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    assert shared.density() == pytest.approx(plan.density(), abs=1e-12)


def test_residuals_undo_a_window_where_nothing_changed(sd35):
    """A window with what it left out at the last full step is nearer to full attention than alone. Right after that
    step, on the same tokens, it is full attention."""
    window = Option(Method.arrow(8), band=True)
    residual = Option(Method.arrow(8), band=True, residual=True)
    exact = sample_scheme(sd35, choice(sd35, (CACHE,), IN_FULL), **ARGUMENTS | GUIDED)
    errors = [
        np.linalg.norm(sample_scheme(sd35, choice(sd35, (option,), 0), **ARGUMENTS | GUIDED) - exact)
        for option in (residual, window)
    ]
    assert errors[0] < 0.9 * errors[1]
    still = ARGUMENTS | GUIDED | {"sigmas": [1.0, 1.0 - 1e-7], "num_inference_steps": None}
    two = choice(sd35, (residual,), 0)
    two = SchemeChoices(two.options, two.picks[:2], two.layouts)
    full = SchemeChoices(two.options, np.full_like(two.picks, IN_FULL), two.layouts)
    got, want = (sample_scheme(sd35, one, **still) for one in (two, full))
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


def test_shared_guidance_gives_both_halves_the_unconditional_attention(sd35):
    """Without a difference between the halves it changes nothing; with one it does."""
    shared = Option(Method("full"), share_guidance=True)
    same = ARGUMENTS | GUIDED | {"negative_prompt": ARGUMENTS["prompt"]}
    for arguments, equal in ((same, True), (ARGUMENTS | GUIDED, False)):
        got = sample_scheme(sd35, choice(sd35, (shared,), 0), **arguments)
        want = sample_scheme(sd35, choice(sd35, (shared,), IN_FULL), **arguments)
        assert (np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)) == equal
    with pytest.raises(ValueError, match="no unconditional half"):
        sample_scheme(sd35, choice(sd35, (shared,), 0), **ARGUMENTS | {"guidance_scale": 1.0})


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_gets_sparser_with_its_threshold(name, sd35, bars):
    scheme = SCHEMES[name]
    found = [calibrate_scheme(sd35, scheme, threshold, c=None, **ARGUMENTS | GUIDED) for threshold in (0.0, 0.3, 9.0)]
    assert bars == [("calibrate", 0)] * 3, "a bar hides a compilation"
    densities = [shared.density() for shared in found]
    assert densities[0] == 1 and densities == sorted(densities, reverse=True) and densities[2] < 0.7
    assert (found[2].picks[0] == IN_FULL).all()
    if not scheme.per_head:  # layers decide as a whole
        assert (found[1].picks == found[1].picks[..., :1]).all()


def test_density_counts_halves_bands_and_the_windows_that_residuals_need():
    layout = Layout(num_text=4, num_visual=60, text_first=False)
    band = Option(Method.arrow(4), band=True, residual=True)
    near = np.abs(np.subtract.outer(np.arange(64), np.arange(64))) <= 8
    halved = Option(Method("full"), share_guidance=True)
    shared = SchemeChoices((band, halved), np.array([[[-1, -1]], [[0, 1]]], np.int32), (layout,))
    assert shared.density() == pytest.approx((1 + 1 + near.mean() + near.mean() + 0.5) / 4)
    assert isinstance(SCHEMES["attention caching"], Scheme)
