"""NaN and infinity in weights are named at load, in every dtype, on the host and on an accelerator."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from damage import KEY, WEIGHTS, copy_model, edit_tensors, refuses

from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.weights.leaf import Block, Leaf, is_finite, on_accelerator, on_host

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)
BROKEN = (np.nan, -np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_say_what_is_finite(dtype):
    """Every 16-bit float, and float32 with the same leading bits."""
    bits = np.arange(2**16, dtype=np.uint16)
    floats = bits.view(dtype) if np.dtype(dtype).itemsize == 2 else (bits.astype(np.uint32) << 16).view(dtype)
    for number in (*range(0, 2**16, 97), *range(0x7BF0, 0x7C10), *range(0x7F70, 0x7F90), *range(0xFB00, 2**16, 3)):
        value = floats[number : number + 1]
        assert is_finite(value) == bool(np.isfinite(value.astype(np.float32))[0]), value
    assert is_finite(np.zeros(0, dtype)) and is_finite(np.array(1, dtype))


@pytest.mark.parametrize("place", [on_host, on_accelerator])
@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("stored", DTYPES)
def test_broken_weights_are_named(stored, value, place):
    rows = np.ones((4, 8), stored)
    leaf = Leaf((4, 8), np.dtype(stored), [Block("model.safetensors: x.weight", 0, lambda: rows)])
    for dtype in DTYPES:
        place(leaf, np.dtype(dtype))
    rows[3, 7] = value
    for dtype in DTYPES:
        with refuses(None, "model.safetensors: x.weight holds NaN or infinity"):
            place(leaf, np.dtype(dtype))


@pytest.mark.parametrize("place", [on_host, on_accelerator])
@pytest.mark.parametrize("dtype, value", [(np.float16, 7e4), (np.float16, -7e4), (ml_dtypes.bfloat16, 3.4e38)])
def test_weights_that_leave_a_dtype_are_named(dtype, value, place):
    leaf = Leaf((2,), np.dtype(np.float32), [Block("file: x", 0, lambda: np.float32([1, value]))])
    with refuses(None, f"file: x holds values that are not finite in {np.dtype(dtype).name}"):
        place(leaf, np.dtype(dtype))


def test_folders_of_both_formats_name_the_parameter(tiny_flux_schnell, tmp_path):
    folder = copy_model(tiny_flux_schnell, tmp_path / "model")
    out = convert_checkpoint(folder, tmp_path / "out")
    chunk = next((out / "weights" / "transformer" / "proj_out.bias.value").glob("[0-9]*"))
    data = np.fromfile(chunk, np.float32)
    data[1] = np.nan
    data.tofile(chunk)
    with refuses(out, "transformer/proj_out.bias.value holds NaN or infinity"):
        open_checkpoint(out, verify=False).load("transformer")

    edit_tensors(folder, lambda tensors: tensors[KEY].__setitem__(0, np.inf))
    with refuses(folder, f"{WEIGHTS}: {KEY} holds NaN or infinity"):
        open_checkpoint(folder).load("transformer", jnp.bfloat16)
    with refuses(folder, f"{WEIGHTS}: {KEY} holds NaN or infinity"):
        convert_checkpoint(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()
