"""Images that cannot be are named, with the step that broke them."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dfa2_jax.options import Options
from dfa2_jax.pipeline.health import faults_of

CALL = {"prompt": ["red", "blue"], "height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipeline(pipelines):
    return pipelines("tiny_flux_dev")


def broken_at(call, step):
    def broken(x):
        return np.concatenate([x[:step], np.full_like(x[:1], np.nan), x[step + 1 :]])

    solver = jax.tree.map(broken, call.inputs.solver)
    return replace(call, inputs=replace(call.inputs, solver=solver))


def test_the_first_step_that_is_not_finite_is_named(pipeline):
    call = broken_at(pipeline.prepare(Options(**CALL, progress=False)), 2)
    tokens = call.run()
    want = tuple(f"image {number}: its latents are not finite from step 3 of 4 on" for number in (0, 1))
    assert faults_of(call, tokens, call.images(tokens)) == want


def test_one_broken_image_of_a_batch_is_named(pipeline):
    call = pipeline.prepare(Options(**CALL))
    tokens, images = np.random.default_rng(0).normal(size=(2, *call.tokens.shape[1:])), np.zeros((2, 64, 64, 3))
    tokens[1] = 0.5
    images[0, 0, 0] = np.nan
    assert faults_of(call, tokens, images) == (
        "image 0: the autoencoder makes numbers of its latents that are not finite",
        "image 1: its latents are the constant 0.5",
    )
    images[0] = 0.25
    assert faults_of(call, tokens, images)[0] == "image 0: every pixel is the same"


def test_a_good_image_has_no_faults_and_a_bad_one_is_warned_of(pipeline, monkeypatch, caplog):
    assert pipeline(**CALL, progress=False).faults == ()
    monkeypatch.setattr(
        type(pipeline), "decode", lambda self, latents, **_: np.full((len(latents), 1, 64, 64, 3), np.nan)
    )
    output = pipeline(**CALL, progress=False)
    assert output.faults == ("image 0: every pixel is the same", "image 1: every pixel is the same")
    assert output.faults[0] in caplog.text and output.images[0].getextrema() == ((0, 0),) * 3
