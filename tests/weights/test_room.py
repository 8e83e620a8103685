"""Weights that do not fit are refused before any is read."""

import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from dfa2_jax import Pipeline
from dfa2_jax.cli import main
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.parallel.mesh import DeviceMesh
from dfa2_jax.weights import room


@pytest.fixture
def has_room(monkeypatch):
    """Says how many bytes are free."""
    return lambda size: monkeypatch.setattr(room, "free_bytes", lambda devices: size)


def nbytes(model):
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_need_what_they_take(dtype, tiny_sd35, has_room, monkeypatch):
    checkpoint = open_checkpoint(tiny_sd35)
    size = nbytes(checkpoint.load("transformer", dtype))
    has_room(size)
    checkpoint.load("transformer", dtype)
    has_room(size - 1)
    monkeypatch.setattr("dfa2_jax.weights.checkpoint.load_leaf", None)
    with pytest.raises(MemoryError, match=r"weights of transformer take 0\.0 GB, and .* dtype=.* may take less"):
        checkpoint.load("transformer", dtype)


@pytest.mark.parametrize("shard", [False, True])
def test_each_of_several_devices_needs_its_own_share(shard, tiny_sd35, has_room):
    checkpoint, devices = open_checkpoint(tiny_sd35), jax.devices()[:2]
    places = DeviceMesh.of(devices, 1, shard)
    arrays = jax.tree.leaves(nnx.state(checkpoint.load("transformer", "float32", places), nnx.Param))
    size = sum(own.data.nbytes for x in arrays for own in x.addressable_shards if own.device == devices[0])
    whole = sum(x.nbytes for x in arrays)
    assert size < 0.7 * whole if shard else size == whole
    has_room(size)
    checkpoint.load("transformer", "float32", places)
    has_room(size - 1)
    with pytest.raises(MemoryError, match="on each of 2 devices"):
        checkpoint.load("transformer", "float32", places)


def test_a_text_encoder_has_ways_of_its_own(tiny_sd35, has_room):
    pipeline = Pipeline.from_pretrained(tiny_sd35)
    has_room(1000)
    with pytest.raises(MemoryError, match=r"weights of text_encoder\w* take .* text_encoder_dtype=.* prompt_embeds"):
        pipeline("a red box", num_inference_steps=1)


def test_a_command_says_so_in_a_line(tiny_sd35, has_room, capsys, tmp_path):
    has_room(1000)
    assert main(["sample", str(tiny_sd35), "--prompt", "a red box", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "The weights of transformer take" in error and "Traceback" not in error


def test_the_fullest_of_the_named_devices_counts():
    def device(process=0, **stats):
        return SimpleNamespace(process_index=process, platform="gpu", memory_stats=lambda: stats or None)

    many = [device(bytes_limit=100, bytes_in_use=10), device(bytes_limit=100, bytes_in_use=40), device()]
    assert room.free_bytes([*many, device(1, bytes_limit=9, bytes_in_use=9)]) == 60
    assert room.free_bytes([device()]) == sys.maxsize  # an allocator that counts nothing
    with jax.default_device(jax.devices()[1]):
        assert 2**20 < room.free_bytes() < sys.maxsize  # the host's, on a CPU
