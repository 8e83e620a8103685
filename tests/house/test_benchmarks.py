"""The benchmark of attention: it times nothing that is wrong, and what it derives follows from what it timed."""

from functools import wraps
from unittest.mock import patch

import jax.numpy as jnp
import pytest

from pallas_kernels import CACHED, Layout

attention = pytest.importorskip("benchmarks.attention", reason="benchmarks/ is beside the tests in a checkout alone")
aot = pytest.importorskip("benchmarks.aot")

pytestmark = pytest.mark.checkout
SHAPE = attention.Shape("small", 1, 3, 64, Layout(64, 512, True), "float32")


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch):
    monkeypatch.setattr(attention, "PRODUCT", {"cpu": 256})
    monkeypatch.setattr(attention, "COPY", {"cpu": 2**16})
    monkeypatch.setattr(attention, "add_torch", lambda *args: None)  # FlexAttention compiles for half a minute


def test_row_follows_from_its_times(monkeypatch):
    monkeypatch.setattr(attention, "visited", lambda row, shape: 0.75)
    found = attention.run(SHAPE, 1)
    seconds = {name: times[0] for name, times in found["all_seconds"].items()}
    operations = 4 * 576**2 * 64 * 3
    assert found["dense_tflops"] == pytest.approx(1e-12 * operations / seconds["dense"])
    assert found["ceilings"]["product_tflops"] == pytest.approx(2e-12 * 256**3 / seconds["product"])
    assert found["ceilings"]["copy_gb_s"] == pytest.approx(2e-9 * 2**16 / seconds["copy"])
    assert found["rows"]["full"]["density"] == 1 and found["rows"]["cached"]["density"] == 0
    for name, row in found["rows"].items():
        speedup = seconds["dense"] / seconds[f"arrow {name}"]
        assert row["efficiency"]["dense"] == pytest.approx(speedup * row["density"])
        assert row["tflops"] == pytest.approx(1e-12 * operations * 0.75 / seconds[f"arrow {name}"])
        assert row["tile_efficiency"]["dense"] == pytest.approx(speedup * 0.75)


def scaled_by(scale):
    return lambda out, half_window: out * scale


def second_image(out, half_window):
    return out.at[1].mul(1.001)


def cached_heads(out, half_window):
    return out if half_window is None else jnp.where((half_window == CACHED)[:, None], 123, out)


@pytest.mark.parametrize("change", [scaled_by(1.001), scaled_by(float("nan")), second_image, cached_heads])
def test_wrong_output_is_not_timed(change):
    arrow = attention.arrow_attention

    @wraps(arrow)
    def wrong(q, k, v, half_window=None, **options):
        return change(arrow(q, k, v, half_window, **options), half_window)

    with patch.object(attention, "arrow_attention", wrong), pytest.raises(AssertionError, match="nothing was timed"):
        attention.run(SHAPE._replace(batch=2), 1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("implementation", ["triton", "mosaic", "jax_triton"])
def test_share_of_the_tensor_cores_is_that_of_the_measured_row(implementation, head_dim):
    """Mosaic's is the default's row, the others' their own."""
    share = aot._measured(implementation, head_dim)["measured_share_h100"]
    assert 0.3 < share < 0.8 and (implementation == "mosaic") == (share > 0.51)
