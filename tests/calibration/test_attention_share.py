"""What share of a step is attention, counted in its program, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from real_shapes import denoise_arguments

from dfa2_jax.calibration.attention_share import multiplications, shares_of, step_shares
from dfa2_jax.options import Options


def test_products_in_loops_count_as_often_as_they_run():
    x, stack = jnp.ones((3, 5, 7)), jnp.ones((4, 7, 7))

    def program(x, stack):
        looped = jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(x, w), None), x, stack)[0]
        return jnp.einsum("bij,bkj->bik", looped, x) * 2

    assert multiplications(jax.make_jaxpr(program)(x, stack).jaxpr) == 4 * 3 * 5 * 7 * 7 + 3 * 5 * 5 * 7


@pytest.mark.parametrize("guided", [False, True])
def test_share_of_sd35_is_that_of_its_layers(guided, pipelines):
    pipeline = pipelines("tiny_sd35")
    size = {"height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 16}
    call = pipeline.prepare(Options(prompt="a", **size, guidance_scale=1 + 3.0 * guided))
    share = shares_of(call).attention
    width = pipeline.config.num_attention_heads * pipeline.config.attention_head_dim
    layers = call.setting.layers
    attention = sum(2 * (layer.num_text + layer.num_visual) ** 2 * width for layer in layers)
    # Each token has q, k, v and the output in each attention; in each block's MLP, twice a fourfold width. The last
    # block's text takes q, k and v alone.
    joint = [layer for layer in layers if layer.name.startswith("joint")]
    rest = sum(4 * width**2 * (layer.num_text + layer.num_visual) for layer in layers)
    rest += sum(8 * width**2 * (layer.num_text + layer.num_visual) for layer in joint)
    rest -= 9 * width**2 * joint[-1].num_text
    # Modulation, embeddings and the last projection are the rest of the rest.
    assert attention / (attention + 1.6 * rest) < share < attention / (attention + rest)


def test_products_of_8_bits_count_by_half_where_a_kernel_computes_them():
    """FLUX.1-dev at 1024 px on Hopper, which multiplies them at twice the rate of bfloat16."""
    hopper = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    shares = []
    for precision in (None, "float8"):
        graph, *arguments = denoise_arguments("FLUX.1-dev", 1024, precision)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=hopper)):
            shares.append(step_shares(graph, *arguments[:3]))
    plain, quantised = (share.attention for share in shares)
    assert 0.15 < plain < 0.25
    assert quantised == pytest.approx(plain / (plain + (1 - plain) / 2), rel=0.02)
    assert shares[1].projections == pytest.approx(shares[0].projections / 2 * quantised / plain, rel=0.02)
