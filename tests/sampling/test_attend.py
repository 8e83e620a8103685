"""An attention of the user's own in the pipeline, with a memory of its own."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfa2_jax import Plan
from pallas_kernels import arrow_attention

CALL = {"prompt": "red", "num_inference_steps": 4, "max_sequence_length": 16, "output_type": "latent"}
SIZES = {"tiny_sd35": {"height": 64, "width": 96, "guidance_scale": 4.0}, "tiny_flux_dev": {"height": 64, "width": 64}}


@dataclass(frozen=True)
class EverySecondStep:
    """Full attention at even steps; at odd steps every layer returns its last output."""

    def memory(self, stack):
        return jnp.zeros(stack.shape, stack.dtype)

    def __call__(self, project, layout, memory, plan):
        fresh = lambda: arrow_attention(*project(), layout=layout)  # noqa: E731
        out = jax.lax.cond(plan.step % 2 == 0, fresh, lambda: memory[plan.place])
        return out, memory.at[plan.place].set(out)


@pytest.mark.parametrize("name", SIZES)
def test_it_gives_what_a_plan_of_the_same_meaning_gives(name, pipelines):
    pipeline, call = pipelines(name), CALL | SIZES[name]
    plan = Plan.full(pipeline.setting(**call)).with_method([1, 3], None, None, "cached")
    want = pipeline(**call, plan=plan, progress=False).images
    for progress in (False, True):  # one program call, and one a step: the memory goes from call to call
        output = pipeline(**call, attend=EverySecondStep(), progress=progress)
        np.testing.assert_allclose(output.images, want, atol=2e-5)
        assert output.metadata["attend"] == "EverySecondStep()" and output.metadata["density"] is None
    assert np.abs(want - pipeline(**call, progress=False).images).max() > 1e-2


def test_a_plan_and_an_attention_contradict_each_other(pipelines):
    pipeline, call = pipelines("tiny_flux_dev"), CALL | SIZES["tiny_flux_dev"]
    plan = Plan.full(pipeline.setting(**call))
    with pytest.raises(ValueError, match="plan and attend both say what attention does"):
        pipeline(**call, plan=plan, attend=EverySecondStep())


def test_its_memory_is_refused_where_it_does_not_fit(monkeypatch, pipelines):
    monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices: 1000)
    with pytest.raises(MemoryError, match="are free"):
        pipelines("tiny_flux_dev")(**CALL | SIZES["tiny_flux_dev"], attend=EverySecondStep())


def test_misspelt_options_name_the_nearest_one(pipelines):
    pipeline = pipelines("tiny_flux_dev")
    for call in (pipeline, pipeline.setting):
        with pytest.raises(TypeError, match="'heigth': did you mean 'height'"):
            call(prompt="red", heigth=64)
