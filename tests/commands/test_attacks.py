"""What an attack on commands, files and arguments found, each with what is right."""

import io
import json
import os
import shutil
from contextlib import redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfa2_jax import CheckpointError, Pipeline, calibrate, cli, conversion, convert_checkpoint, quality_report
from dfa2_jax.io.atomic import alone
from dfa2_jax.io.images import read_metadata
from dfa2_jax.io.names import natural
from dfa2_jax.io.terminal import print_path
from dfa2_jax.options import Options
from dfa2_jax.pipeline.health import faults_of
from dfa2_jax.plan.plan import Plan
from dfa2_jax.weights.verify import verify_folder

SIZE = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}
FLAGS = ["--height", "64", "--width", "64", "--steps", "2", "--max-sequence-length", "16", "--quiet"]


@pytest.fixture
def loaded(pipelines, monkeypatch, cache):
    """A model that needs no time to load."""
    pipeline = pipelines("tiny_flux_dev")
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, **options: pipeline)
    return pipeline


def error_of(capsys, *arguments):
    assert cli.main([*arguments]) == 2
    return capsys.readouterr().err


def test_a_link_to_nothing_in_a_snapshot_is_named(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    (snapshot / "vae").mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "vae" / "weights.safetensors").symlink_to(blobs / ("0" * 64))
    with pytest.raises(CheckpointError, match="weights.safetensors is missing: it links to 0000"):
        verify_folder(snapshot)


def test_a_file_that_appeared_meanwhile_is_not_replaced(loaded, tmp_path):
    output, path = loaded("red", **SIZE, progress=False), tmp_path / "a.png"
    output.save(path, overwrite=False)
    with pytest.raises(FileExistsError, match="was made by another process meanwhile"):
        output.save(path, overwrite=False)
    assert output.save(path) == [path]


def test_one_calibration_at_a_time_writes_a_plan(loaded, tmp_path, capsys):
    prompts, out = tmp_path / "prompts", tmp_path / "plan.json"
    prompts.write_text("red\n")
    with alone(out):
        error = error_of(capsys, "calibrate", "model", "--prompts", str(prompts), "--out", str(out), *FLAGS)
    assert "plan.json is being made by another process" in error and not out.exists()


def test_bad_images_are_told_again_by_the_command_that_skips_them(loaded, tmp_path, monkeypatch, capsys):
    white = np.full((1, 1, 64, 64, 3), 1.0, np.float32)
    monkeypatch.setattr(type(loaded), "decode", lambda self, latents, **_: np.repeat(white, len(latents), 0))
    command = ["sample", "model", "--prompt", "red", "--out", str(tmp_path / "images"), *FLAGS]
    assert cli.main(command) == 1
    (path,) = (tmp_path / "images").iterdir()
    assert read_metadata(path)["faults"] == ["image 0: every pixel is the same"]
    capsys.readouterr()
    assert cli.main(command) == 1
    assert "every pixel is the same" in capsys.readouterr().err
    assert cli.main(["again", str(path), "--quiet", "--out", str(tmp_path / "again")]) == 1


def test_an_image_of_one_colour_is_a_fault(loaded):
    call = loaded.prepare(Options(prompt="red", **SIZE))
    tokens = np.random.default_rng(0).normal(size=call.tokens.shape)
    colour = np.broadcast_to(np.float32([0.4, 0.3, 0.6]), (1, 64, 64, 3))
    assert faults_of(call, tokens, colour) == ("image 0: every pixel is the same",)


@pytest.mark.parametrize("name", ["n" * 256, "file/below"])
def test_a_name_that_cannot_be_is_refused_before_work(name, tiny_flux_schnell, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(conversion, "write_folder", None)
    with pytest.raises(CheckpointError, match="could not be written: (File name too long|Not a directory)"):
        convert_checkpoint(tiny_flux_schnell, tmp_path / name)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_a_tokenizer_s_folder_holds_files_alone(kind, tiny_flux_schnell, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(tiny_flux_schnell, source)
    extra = source / "tokenizer" / "extra.txt"
    extra.symlink_to("/dev/zero") if kind == "device" else os.mkfifo(extra)
    monkeypatch.setattr(conversion, "write_folder", None)
    with pytest.raises(CheckpointError, match="extra.txt is a .*, not a file"):
        convert_checkpoint(source, tmp_path / "out")


def test_absurd_counts_and_endless_prompts_are_refused(loaded, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "images"), *FLAGS]
    error = error_of(capsys, "sample", "model", "--prompt", "red", "--num-images-per-prompt", "1000000000", *out)
    assert "1000000000 must be 1 to 1000" in error
    monkeypatch.setattr("dfa2_jax.commands.start.MAX_PROMPTS", 1000)
    error = error_of(capsys, "sample", "model", "--prompts", "/dev/zero", *out)
    assert "holds more than 1,000 characters" in error
    error = error_of(capsys, "sample", "model", "--prompt", "red", "--out", str(tmp_path / "cat.gif"))
    assert "the suffix of a format that images are not written in: .png" in error


def test_paths_are_printed_where_stdout_is_no_file():
    with redirect_stdout(io.StringIO()) as said:
        print_path("a/é")
    assert said.getvalue() == "a/é\n"


def test_escapes_of_an_image_s_metadata_are_shown_as_text(loaded, tmp_path, capsys):
    (path,) = loaded("red", **SIZE, progress=False).save(tmp_path / "a.png")
    made = read_metadata(path) | {"device": "\x1b]0;owned\x07", "fingerprint": "\x1b[2J"}
    from PIL import Image

    from dfa2_jax.io.images import encode

    with Image.open(path) as pixels:
        data = encode(pixels, "png", made, "")
    path.write_bytes(data)
    assert cli.main(["again", str(path), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\\x1b]0;owned" in said


def test_what_attention_remembers_is_of_32_bits(loaded):
    class Remembers:
        def memory(self, stack):
            return jnp.zeros(3)

        def __call__(self, project, layout, memory, plan):
            raise NotImplementedError

    with jax.enable_x64(True):
        state = loaded.prepare(Options(prompt="red", **SIZE)).start(Remembers())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.memory)} == {"float32"}


def test_numpy_s_numbers_and_lists_are_natural(loaded, no_shape_checks, tmp_path):
    assert natural(np.int64(3)) == 3 and type(natural(np.float32(0.5))) is float
    assert natural([1, np.int64(2)]) == (1, 2) == natural(np.array([1, 2])) and natural("red") == "red"
    options = {"guidance_scale": np.float32(3.5), "seed": np.int64(3), "progress": False} | SIZE
    plan = calibrate(loaded, ["red"], speedup=np.float32(2), **options)
    assert len(plan.nodes) == 1 and plan.step_calibration.seed == 3
    heads = calibrate(loaded, ["red"], delta=np.float32(0.5), windows=np.array([4]), tiles=[16, 16], **options)
    plan.save(tmp_path / "plan.json")
    report = quality_report("model", {"heads": heads}, ["red"], seed=np.int64(0), batch=np.int64(1), quick=True)
    assert json.loads(report.save(tmp_path).with_suffix(".json").read_text())["seeds"] == [0]


def test_a_dtype_that_is_none_is_named(tiny_flux_dev):
    for dtype in ("bogus", "int16"):
        with pytest.raises(ValueError, match=f"dtype='{dtype}' is none of float32, "):
            Pipeline.from_pretrained(tiny_flux_dev, dtype=dtype)


def test_a_plan_is_drawn_beside_it_and_over_nothing_else(loaded, tmp_path, capsys):
    path, picture = tmp_path / "cat.json", tmp_path / "cat.png"
    Plan.full(loaded.setting(prompt="", **SIZE)).save(path)
    picture.write_bytes(b"a cat")
    assert cli.main(["plan", "show", str(path)]) == 0
    assert picture.read_bytes() == b"a cat" and (tmp_path / "cat.json.png").exists()
    assert capsys.readouterr().out.endswith("cat.json.png\n")
    assert cli.main(["plan", "show", str(path), "--png", str(picture)]) == 2
    assert "cat.png is there, and is no picture" in capsys.readouterr().err and picture.read_bytes() == b"a cat"
