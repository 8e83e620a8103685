"""The published models' sampling loops lower for CUDA at their true shapes, in bfloat16."""

import re

import jax
import jax.numpy as jnp
import pytest
from lowering import PRODUCT, lower_for_cuda
from real_shapes import PUBLISHED, VIDEO_GRIDS, denoise_arguments, planned_arguments

from dfa2_jax.sampling.loop import denoise, denoise_planned

PARAMETERS = {
    "SD3-medium": 2_028_328_000,
    "SD3.5-medium": 2_243_171_520,
    "SD3.5-large": 8_056_627_520,
    "FLUX.1-dev": 11_901_408_320,
    "FLUX.1-schnell": 11_891_178_560,
    "CogVideoX-2B": 1_693_783_872,
    "CogVideoX-5B": 5_570_283_072,
    "CogVideoX1.5-5B": 5_570_676_352,
    "HunyuanVideo 544p": 12_821_012_544,
    "HunyuanVideo 720p": 12_821_012_544,
}
"""Counted by diffusers' own classes on torch's meta device."""


def assert_float32_products_are_ieee(text):
    """In a bfloat16 program too, a product that reads float32 asks for IEEE float32 (`assert_highest_precision`)."""
    products = [match.group(0) for match in PRODUCT.finditer(text)]
    assert products, "the program has no matrix product and no convolution"
    for line in products:
        operands = line.rsplit(" : ", 1)[1].split("->")[0]
        if "f32>" in operands:
            assert len(re.findall(r"\bHIGHEST\b", line)) == 2, f"not at HIGHEST precision: {line}"


@pytest.mark.parametrize("pixels", [1024, 2048])
@pytest.mark.parametrize("name", PUBLISHED)
def test_sampling_loop_lowers_for_cuda(name, pixels):
    graph, params, *rest = denoise_arguments(name, pixels)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    lowered = denoise.trace(graph, params, *rest, implementation="blockwise").lower(lowering_platforms=("cuda",))
    assert_float32_products_are_ieee(lowered.as_text())


@pytest.mark.parametrize("name", VIDEO_GRIDS)
def test_the_loop_of_a_video_lowers_for_cuda(name):
    graph, params, *rest = denoise_arguments(name, VIDEO_GRIDS[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    lowered = denoise.trace(graph, params, *rest, implementation="blockwise").lower(lowering_platforms=("cuda",))
    assert_float32_products_are_ieee(lowered.as_text())
    planned = denoise_planned.trace(*planned_arguments(name, VIDEO_GRIDS[name]), implementation="blockwise")
    assert_float32_products_are_ieee(planned.lower(lowering_platforms=("cuda",)).as_text())


@pytest.mark.parametrize("precision", [None, "highest"])
def test_a_tf32_product_would_be_seen(precision):
    x = jnp.ones((4, 4))
    text = lower_for_cuda(lambda x: jnp.dot(x, x, precision=precision), x).as_text()
    if precision:
        return assert_float32_products_are_ieee(text)
    with pytest.raises(AssertionError, match="not at HIGHEST precision"):
        assert_float32_products_are_ieee(text)
