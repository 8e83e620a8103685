"""Settings of the user's JAX change no number."""

import jax
import numpy as np
import pytest

from dfa2_jax import Pipeline, calibrate

CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.mark.parametrize("name", ["tiny_flux_dev"])
def test_64_bit_jax_changes_no_number(name, request):
    """`JAX_ENABLE_X64=1`: another project in the same shell needs it."""

    def run():
        pipeline = Pipeline.from_pretrained(request.getfixturevalue(name))
        call = CALL | {"prompt": "red", "output_type": "latent", "progress": False}
        plan = calibrate(pipeline, ["red"], **CALL, delta=10.0, tiles=(16, 16), progress=False)
        return pipeline(**call).images, pipeline(**call, plan=plan).images, plan.choices

    with jax.enable_x64(True):
        wide = run()
    for ours, same in zip(run(), wide, strict=True):
        np.testing.assert_array_equal(same, ours)


def test_all_tests_run_with_strict_promotion():
    """What a sum of two types, or of two ranks, becomes is written down everywhere: a user may forbid the rest."""
    assert jax.config.jax_numpy_dtype_promotion == "strict" and jax.config.jax_numpy_rank_promotion == "raise"
