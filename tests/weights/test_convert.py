"""Conversion: both routes give the same parameters, Orbax alone can read them, and a failed one leaves nothing."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from convert_cases import assert_equal_weights, leaves
from damage import copy_model
from flax import nnx

from dfa2_jax import conversion as convert_module
from dfa2_jax.cli import convert as main
from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.families.registry import networks, open_checkpoint
from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.weights import leaf as leaf_module
from dfa2_jax.weights.checkpoint import compute_dtype
from dfa2_jax.weights.verify import verify_folder

FOLDERS = ["tiny_sd35", "tiny_flux_dev"]


@pytest.mark.parametrize("name", FOLDERS)
def test_both_routes_give_the_same_parameters(name, request, tmp_path):
    source = open_checkpoint(request.getfixturevalue(name))
    convert_checkpoint(source.folder, tmp_path / "out")
    converted = open_checkpoint(tmp_path / "out")
    assert (converted.pipeline_class, converted.configs) == (source.pipeline_class, source.configs)
    assert converted.fingerprint == source.fingerprint and len(source.fingerprint) == 64
    for component in set(source.configs) - {"scheduler"}:
        assert_equal_weights(converted, source, component)
    for component in set(source.configs) - {"scheduler", "transformer", "vae"}:
        tokenizer = component.replace("text_encoder", "tokenizer")
        assert (converted.tokenizer_folder(tokenizer) / "tokenizer.json").is_file()


def assert_plain_orbax_restores(folder):
    checkpoint = open_checkpoint(folder)
    abstract = nnx.state(checkpoint.abstract("transformer", jnp.float32))
    restored = ocp.StandardCheckpointer().restore(folder / "weights" / "transformer", abstract)
    wanted = leaves(checkpoint, "transformer")
    found = dict(nnx.to_flat_state(restored))
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path][...], leaf[...])


def test_plain_orbax_restores_into_the_model(tiny_sd35, tmp_path):
    convert_checkpoint(tiny_sd35, tmp_path / "out")
    assert_plain_orbax_restores(tmp_path / "out")


def test_large_tables_go_in_equal_blocks_of_rows(tiny_sd35, tmp_path, monkeypatch):
    """As T5-XXL's embeddings and SD3's position table do at their true sizes."""
    from dfa2_jax.weights import rules

    assert rules.equal_blocks((32128, 4096), 32128 * 4096 * 2) == 8032
    assert rules.equal_blocks((7,), 14) == 7
    monkeypatch.setattr(rules, "BLOCK_BYTES", 50_000)
    source = open_checkpoint(tiny_sd35)
    table = source.leaves("transformer")["pos_embed",]
    assert [block.start for block in table.blocks] == list(range(0, 576, 576 // len(table.blocks)))
    assert len(table.blocks) > 1
    convert_checkpoint(tiny_sd35, tmp_path / "out")
    monkeypatch.undo()
    for component in ("transformer", "text_encoder_2", "text_encoder_3"):
        assert_equal_weights(open_checkpoint(tmp_path / "out"), open_checkpoint(tiny_sd35), component)
    assert_plain_orbax_restores(tmp_path / "out")


def test_parameters_equal_the_torch_tensors(tiny_flux_dev, tiny_sd35):
    """A few by hand; the forward passes cover the rest."""
    from dfa2_jax.weights.safetensors import open_weights

    flux = leaves(open_checkpoint(tiny_flux_dev), "transformer")
    torch = {key: tensor.array() for key, tensor in open_weights(tiny_flux_dev / "transformer").items()}
    single = torch["single_transformer_blocks.2.proj_out.weight"]
    np.testing.assert_array_equal(
        flux["single_transformer_blocks", "ff", "down", "weight", "kernel"][2], single[:, 64:].T
    )
    np.testing.assert_array_equal(
        flux["transformer_blocks", "visual", "attn", "to_out", "weight", "kernel"][1],
        torch["transformer_blocks.1.attn.to_out.0.weight"].T,
    )
    sd3 = leaves(open_checkpoint(tiny_sd35), "transformer")
    torch = {key: tensor.array() for key, tensor in open_weights(tiny_sd35 / "transformer").items()}
    patch = torch["pos_embed.proj.weight"]
    np.testing.assert_array_equal(sd3["patch_embed", "kernel"][...], patch.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        sd3["segments", 1, "visual", "attn", "to_q", "bias"][0], torch["transformer_blocks.2.attn.to_q.bias"]
    )
    assert isinstance(sd3["pos_embed",].get_value(), np.ndarray), "the position table left the host"


@pytest.mark.torch
@pytest.mark.parametrize("save", [{"max_shard_size": "200KB"}, {"variant": "fp16"}], ids=["sharded", "variant"])
def test_sharded_and_variant_folders(save, tmp_path):
    import tiny
    import torch

    half = torch.float16 if "variant" in save else torch.float32
    tiny.write("flux-schnell", tmp_path / "source", dtype=half, **save)
    files = [path.name for path in (tmp_path / "source" / "transformer").iterdir()]
    assert any("index" in name for name in files) or any(".fp16." in name for name in files)
    source = open_checkpoint(tmp_path / "source")
    assert source.stored_dtype("transformer") == (jnp.float16 if "variant" in save else jnp.float32)
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    for component in ("transformer", "text_encoder_2", "vae"):
        assert_equal_weights(open_checkpoint(tmp_path / "out"), source, component, "bfloat16")


def test_old_and_new_clip_prefixes(tiny_flux_dev, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_flux_dev, tmp_path / "other")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    prefix = "text_model."
    has = any(key.startswith(prefix) for key in tensors)
    renamed = {key.removeprefix(prefix) if has else prefix + key: value for key, value in tensors.items()}
    renamed["text_model.embeddings.position_ids"] = np.arange(77)[None]  # older transformers stored it
    save_file(renamed, file)
    assert_equal_weights(open_checkpoint(folder), open_checkpoint(tiny_flux_dev), "text_encoder")


@pytest.mark.parametrize(
    ("class_name", "stored", "requested", "platform", "wanted"),
    [
        ("SD3Transformer2DModel", "float16", None, "gpu", "float16"),
        ("T5EncoderModel", "float16", None, "gpu", "bfloat16"),
        ("AutoencoderKL", "float16", None, "gpu", "float32"),
        ("AutoencoderKL", "bfloat16", None, "gpu", "bfloat16"),
        ("T5EncoderModel", "bfloat16", "float16", "gpu", "bfloat16"),
        ("FluxTransformer2DModel", "bfloat16", None, "cpu", "float32"),
        ("FluxTransformer2DModel", "bfloat16", "bfloat16", "cpu", "bfloat16"),
    ],
)
def test_dtype_rule(class_name, stored, requested, platform, wanted):
    assert compute_dtype(networks()[class_name], jnp.dtype(stored), requested, platform) == jnp.dtype(wanted)


def test_command_line(tiny_sd3, tmp_path, capsys):
    assert main([str(tiny_sd3), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "out") and "100%" in printed.err
    assert main([str(tiny_sd3), str(tmp_path / "out")]) == 2
    assert f"dfa2-convert: {tmp_path / 'out'} exists already" in capsys.readouterr().err
    assert main([str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "is converted already" in capsys.readouterr().err


def test_a_hub_id_while_offline(tmp_path):
    with pytest.raises(CheckpointError, match="no folder owner/name, and the hub gave no repository"):
        convert_checkpoint("owner/name", tmp_path / "out", download=True)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch):
    """A mistyped path has the look of a hub id."""
    monkeypatch.setattr("huggingface_hub.file_download.http_get", None)
    with pytest.raises(
        CheckpointError, match=r"no folder modles/flux here.*dfa2-convert modles/flux FOLDER --download"
    ):
        convert_checkpoint("modles/flux", tmp_path / "out")


def test_a_hub_id_is_fetched_into_the_cache(tiny_flux_schnell, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(tiny_flux_schnell)
    )
    convert_checkpoint("owner/name", tmp_path / "out", progress=None, download=True)
    assert open_checkpoint(tmp_path / "out").pipeline_class == "FluxPipeline"
    from fnmatch import fnmatch

    wanted = lambda name: any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])  # noqa: E731
    assert wanted("transformer/a.safetensors") and wanted("model_index.json") and wanted("tokenizer/merges.txt")
    assert not wanted("flux1-schnell.safetensors") and not wanted("text_encoder/model.bin")


SLOW = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
from dfa2_jax import cli, conversion
write_chunk = conversion.write_chunk
def slow(*args):
    time.sleep(0.05)
    return write_chunk(*args)
conversion.write_chunk = slow
sys.exit(cli.convert(sys.argv[1:]))
"""


@contextmanager
def slow_conversion(source, dst):
    """A process that is in the midst of writing."""
    command = [sys.executable, "-c", SLOW, str(source), str(dst)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not list(dst.parent.glob(f".{dst.name}.*/weights/*/*/[0-9]*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        try:
            yield process
        finally:
            process.kill()


def test_the_next_conversion_removes_what_a_killed_one_left(tiny_flux_schnell, tmp_path):
    source, dst = copy_model(tiny_flux_schnell, tmp_path / "source"), tmp_path / "work" / "out"
    with slow_conversion(source, dst) as process:
        with pytest.raises(CheckpointError, match="out is being made by another process: wait for it, or stop it"):
            convert_checkpoint(source, dst)
        assert process.poll() is None
        process.kill()
    assert len(list(dst.parent.iterdir())) == 2  # what was written, and what was locked
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(dst)
    convert_checkpoint(source, dst)
    assert list(dst.parent.iterdir()) == [dst] and verify_folder(dst) == []


def test_a_signal_stops_the_writers_and_leaves_nothing(tiny_flux_schnell, tmp_path):
    source = copy_model(tiny_flux_schnell, tmp_path / "source")
    with slow_conversion(source, tmp_path / "work" / "out") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)  # the impatient's: cleaning up goes on
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 129 and told.endswith("dfa2-convert: interrupted, nothing was kept\n")
    assert "Traceback" not in told
    assert list((tmp_path / "work").iterdir()) == []


def test_an_exception_of_the_caller_stops_the_writers_and_leaves_nothing(tiny_flux_dev, tmp_path, monkeypatch):
    """As Ctrl-C in a notebook does: it is raised in the thread that waits, while others write."""
    written, write_chunk = [], convert_module.write_chunk
    monkeypatch.setattr(convert_module, "write_chunk", lambda *args: (written.append(1), write_chunk(*args))[1])

    def progress(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tiny_flux_dev, tmp_path / "out", progress=progress)
    count = len(written)
    assert list(tmp_path.iterdir()) == [] and threading.active_count() < 40
    time.sleep(0.3)
    assert len(written) == count, "writers go on"


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["write_chunk", "write_config", "file_sha256", "appearing"])
def test_a_disk_that_fills_up(function, tiny_flux_schnell, tmp_path, monkeypatch, capsys):
    """Whoever meets it: writers of chunks in their threads, what comes after them, or what comes before."""
    source = tiny_flux_schnell if function == "file_sha256" else copy_model(tiny_flux_schnell, tmp_path / "source")

    def fail(*_):
        raise FULL_DISK

    monkeypatch.setattr(convert_module, function, fail)
    assert main([str(source), str(tmp_path / "work" / "out")]) == 2
    told = capsys.readouterr().err
    assert re.search("could not be written: .*No space left on device.* Nothing was kept.", told)
    assert not list(tmp_path.glob("work/*"))


def test_orbax_meets_a_full_disk(tiny_flux_schnell, tmp_path, monkeypatch):
    """Its own writes fail in its own words."""
    import orbax.checkpoint as ocp

    def fail(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing [OS error 28: ENOSPC No space left on device]")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", fail)
    with pytest.raises(
        CheckpointError, match="transformer could not be written: RESOURCE_EXHAUSTED.* Nothing was kept"
    ):
        convert_checkpoint(copy_model(tiny_flux_schnell, tmp_path / "source"), tmp_path / "work" / "out")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_write_that_fails_midway(tiny_flux_dev, tmp_path):
    """The kernel refuses the weights' bytes, as a full disk does; the process goes on and cleans up."""
    code = f"""
import resource, signal
from dfa2_jax import convert_checkpoint
from dfa2_jax import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    convert_checkpoint({str(tiny_flux_dev)!r}, {str(tmp_path / "out")!r})
except CheckpointError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not be written" in run.stdout and "File too large" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_first(tiny_flux_dev, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="has 1,000 bytes free, the checkpoint needs [0-9,]+: make room"):
        convert_checkpoint(tiny_flux_dev, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tiny_flux_dev, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written: (File exists|Not a directory)"):
        convert_checkpoint(tiny_flux_dev, tmp_path / "file" / "out")


def test_a_read_only_folder(tiny_flux_dev, tmp_path, monkeypatch):
    """As for a user who is not root: root may write anywhere."""

    def refuse(path, flags, *mode, **options):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really(path, flags, *mode, **options)

    really = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="could not be written: Permission denied"):
        convert_checkpoint(tiny_flux_dev, tmp_path / "out")


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "no-cpu-backend"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_slabs_cover_a_parameter_in_small_parts(cpu, dtype, tiny_sd35, monkeypatch):
    monkeypatch.setattr(leaf_module, "SLAB_BYTES", 1000)
    if not cpu:
        monkeypatch.setattr(leaf_module, "cpu_device", lambda: None)
    cut = 0
    for leaf in open_checkpoint(tiny_sd35).leaves("transformer").values():
        whole = np.full(leaf.shape, np.nan, dtype)
        for block in leaf.blocks:
            parts = list(leaf_module.slabs(block, np.dtype(dtype)))
            assert all(rows.flags.c_contiguous and rows.dtype == dtype for _, rows in parts)
            for _, rows in parts:
                count = rows.shape[1] if rows.ndim > 1 and len(block.read()) == 1 else len(rows)
                assert rows.size // count * (count - 1) * leaf.dtype.itemsize <= 1000, "more than one row too many"
            flat = np.concatenate([rows.ravel() for _, rows in parts])
            np.testing.assert_array_equal(flat, block.read().astype(dtype).ravel())
            for index, rows in parts:
                whole[index] = rows
            cut += len(parts) > 1
        np.testing.assert_array_equal(whole, np.concatenate([block.read() for block in leaf.blocks]).astype(dtype))
    assert cut > 20


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_accelerators_get_the_same_arrays(dtype, tiny_flux_dev):
    """They are filled by a program of their own, which runs on CPU as well."""
    for leaf in open_checkpoint(tiny_flux_dev).leaves("transformer").values():
        ours = leaf_module.on_accelerator(leaf, np.dtype(dtype))
        np.testing.assert_array_equal(ours, leaf_module.on_host(leaf, np.dtype(dtype)))


def test_arrays_on_the_host_are_not_copied(tiny_flux_dev, monkeypatch):
    on_host, pointers = leaf_module.on_host, []

    def watched(leaf, dtype):
        pointers.append(on_host(leaf, dtype))
        return pointers[-1]

    monkeypatch.setattr(leaf_module, "on_host", watched)
    arrays = jax.tree.leaves(nnx.state(open_checkpoint(tiny_flux_dev).load("transformer")))
    assert {array.unsafe_buffer_pointer() for array in arrays} == {array.ctypes.data for array in pointers}


def test_a_convert_py_of_the_user_is_not_run(tmp_path):
    """`python -c` looks in the working directory first, as `python -m` and an editor do."""
    (tmp_path / "convert.py").write_text("raise SystemExit('the wrong convert')")
    code = "from dfa2_jax.cli import convert; convert(['absent', 'out'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "dfa2-convert: absent is not a folder" in run.stderr and run.returncode == 0


@pytest.mark.checkout
def test_the_script_of_the_checkout():
    import convert

    assert convert.convert_checkpoint is convert_checkpoint and convert.main is main
    root = os.path.dirname(os.path.dirname(convert.__file__))
    run = subprocess.run([sys.executable, "-m", "convert", "--help"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("usage: dfa2-convert")
