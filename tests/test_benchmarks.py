"""The benchmark of attention: it times nothing that is wrong, and what it derives follows from what it timed."""

from unittest.mock import patch

import jax
import pytest

from benchmarks import attention
from benchmarks.aot import _measured
from pallas_kernels import Layout

pytestmark = pytest.mark.checkout
SHAPE = attention.Shape("small", 1, 3, 64, Layout(64, 512, True), "float32")


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch):
    monkeypatch.setattr(attention, "PRODUCT", {"cpu": 256})
    monkeypatch.setattr(attention, "COPY", {"cpu": 2**16})
    monkeypatch.setattr(attention, "add_torch", lambda *args: None)  # FlexAttention compiles for half a minute


def test_row_follows_from_its_times():
    found = attention.run(SHAPE, 1)
    seconds = {name: times[0] for name, times in found["all_seconds"].items()}
    operations = 4 * 576**2 * 64 * 3
    assert found["dense_tflops"] == pytest.approx(1e-12 * operations / seconds["dense"])
    assert found["ceilings"]["product_tflops"] == pytest.approx(2e-12 * 256**3 / seconds["product"])
    assert found["ceilings"]["copy_gb_s"] == pytest.approx(2e-9 * 2**16 / seconds["copy"])
    assert found["rows"]["full"]["tile_density"] == 1 and found["rows"]["cached"]["tflops"] == 0
    for name, row in found["rows"].items():
        taken = seconds[f"arrow {name}"]
        assert row["density"] <= row["tile_density"] <= 1, name
        assert row["tflops"] == pytest.approx(1e-12 * operations * row["tile_density"] / taken)
        assert row["tile_efficiency"]["dense"] == pytest.approx(seconds["dense"] / taken * row["tile_density"])
        assert row["efficiency"]["dense"] == pytest.approx(seconds["dense"] / taken * row["density"])


@pytest.mark.parametrize("scale", [1.001, float("nan")])
def test_wrong_output_is_not_timed(scale):
    arrow = attention.arrow_attention

    def wrong(*args, **options):
        return arrow(*args, **options) * jax.numpy.float32(scale)

    with patch.object(attention, "arrow_attention", wrong), pytest.raises(AssertionError, match="nothing was timed"):
        attention.run(SHAPE, 1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("implementation", ["triton", "mosaic", "jax_triton"])
def test_share_of_the_tensor_cores_is_that_of_the_measured_row(implementation, head_dim):
    """Mosaic's is the default's row, the others' their own."""
    share = _measured(implementation, head_dim)["measured_share_h100"]
    assert 0.3 < share < 0.8 and (implementation == "mosaic") == (share > 0.51)
