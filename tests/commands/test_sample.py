"""`dfa2 sample` as a user runs it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dfa2_jax import Output, Pipeline, cli
from dfa2_jax.commands import start
from dfa2_jax.io.images import read_metadata
from dfa2_jax.pipeline.output import metadata

PROMPT = "a large red circle"
SIZE = ["--height", "64", "--width", "96", "--steps", "2", "--max-sequence-length", "16"]


def test_sample_writes_images_that_say_how_they_were_made(tiny_sd35, tmp_path, cache, capsys):
    out = tmp_path / "images"
    arguments = ["sample", str(tiny_sd35), "--prompt", PROMPT, "--prompt", "a star", "--negative-prompt", "blurry"]
    arguments += [*SIZE, "--seed", "4", "--batch", "2", "--out", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    paths = [out / "a-large-red-circle-seed4-0.png", out / "a-star-seed4-0.png"]
    assert printed.out.splitlines() == [str(path) for path in paths]
    assert {*out.iterdir()} == {*paths}
    phases = [printed.err.index(f"\r{name} ") for name in ("loading", "encoding", "compiling")]
    assert sorted(phases) == phases and phases[-1] < printed.err.index("denoise:") < printed.err.index("2/2")
    for name in ("load", "compile", "encode", "denoise", "per_step", "decode"):
        assert f"{name} " in printed.err.splitlines()[-1]

    made = read_metadata(paths[1])
    assert made["prompt"] == "a star" and made["negative_prompt"] == "blurry" and made["seed"] == 4
    assert made["image"] == 1 and made["batch"]["prompt"] == [PROMPT, "a star"]
    by_hand = Pipeline.from_pretrained(tiny_sd35)(
        [PROMPT, "a star"], negative_prompt="blurry", height=64, width=96, num_inference_steps=2,
        max_sequence_length=16, seed=[4, 4], progress=False,
    )  # fmt: skip
    for path, image in zip(paths, by_hand.images, strict=True):
        np.testing.assert_array_equal(Image.open(path), image)

    assert cli.main([*arguments, "--steps", "1", "--quiet"]) == 0  # other images
    printed = capsys.readouterr()
    assert len(list(out.iterdir())) == 4, "images were overwritten"
    assert printed.err == "" and len(printed.out.splitlines()) == 2


def test_an_interrupted_batch_goes_on_and_compiles_once(
    tiny_flux_schnell, tmp_path, cache, compilations, monkeypatch, capsys
):
    """Three prompts with two seeds, four images at a time: the second batch is filled up."""
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star\u2028on top\na ring\n", encoding="utf-8")
    arguments = ["sample", str(tiny_flux_schnell), "--prompts", str(tmp_path / "prompts.txt"), *SIZE]
    arguments += ["--seed", "1", "2", "--batch", "4"]
    calls, sample = [], Pipeline.sample

    def counted(self, *args):
        before = len(compilations)
        output = sample(self, *args)
        calls.append(len(compilations) - before)
        return output

    monkeypatch.setattr(Pipeline, "sample", counted)
    assert cli.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    assert len(calls) == 2 and calls[1] == 0, "the second batch compiled"
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    slugs = ("a-red-circle", "a-blue-star-on-top", "a-ring")
    assert {*whole} == {f"{slug}-seed{seed}-0.png" for slug in slugs for seed in (1, 2)}

    def interrupted(self, *args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(self, *args)

    monkeypatch.setattr(Pipeline, "sample", interrupted)
    out = tmp_path / "broken"
    assert cli.main([*arguments, "--out", str(out)]) == 130 and len(list(out.iterdir())) == 4
    monkeypatch.setattr(Pipeline, "sample", counted)
    (out / "a-red-circle-seed2-0.png").write_bytes(whole["a-red-circle-seed2-0.png"][:-20])  # not complete
    calls.clear()
    capsys.readouterr()
    assert cli.main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("skipped ") == 3 and len(printed.out.splitlines()) == 6 and len(calls) == 2
    again = {path.name: path.read_bytes() for path in out.iterdir()}
    assert again.pop("a-red-circle-seed2-1.png") == whole["a-red-circle-seed2-0.png"]
    del again["a-red-circle-seed2-0.png"], whole["a-red-circle-seed2-0.png"]
    assert again == whole, "the images of an interrupted run are not those of a whole one"
    assert cli.main([*arguments, "--out", str(out), "--quiet"]) == 0 and len(calls) == 2
    assert capsys.readouterr().err.count("skipped ") == 6


def test_sample_keeps_compiled_programs(tiny_flux_schnell, tmp_path, cache):
    """The second process of a shape compiles nothing that takes long."""
    command = [sys.executable, "-m", "dfa2_jax.cli", "sample", str(tiny_flux_schnell), "--prompt", PROMPT, *SIZE]
    compile_seconds = []
    for out in ("first", "second"):
        run = subprocess.run(
            [*command, "--out", str(tmp_path / out)], capture_output=True, text=True, check=True, env=os.environ
        )
        compile_seconds.append(float(run.stderr.split(", compile ")[1].split(",")[0]))
        assert any(cache.iterdir())
    assert compile_seconds[1] < 0.5 * compile_seconds[0]


@pytest.fixture(scope="module")
def pipeline(pipelines):
    return pipelines("tiny_sd35")


@pytest.fixture
def drawn(pipeline, monkeypatch, cache):
    """A command line whose model needs no time, and whose images are black."""

    def sample(self, options, phase):
        request = self.request(options)
        pixels = np.zeros((request.batch, request.height, request.width, 3), np.float32)
        made = metadata(self, options, request)
        return Output(pixels, made["seed"], {"per_step": 0.0}, made)

    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, **options: pipeline)
    monkeypatch.setattr(Pipeline, "sample", sample)
    return ["sample", "folder", "--quiet", "--prompt", PROMPT]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "100 x 128 must be multiples of 16"),
        (["--dtype", "float32", "--steps", "0"], "num_inference_steps=0"),
        (["--seed", "-1"], "seed=[-1] must be an integer"),
        (["--seed", "1", "2", "--num-images-per-prompt", "2"], "--num-images-per-prompt 2 must be 1 to 1000, and goes"),
        (["--prompt", "b", "--prompt", "c", "--prompt-2", "d", "--prompt-2", "e"], "2 of prompt_2 for 3 prompts"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--out", "{tmp}/a.png", "--seed", "1", "2"], "a.png is one file for 2 images or videos: give a folder"),
        (["--out", "{tmp}/a.jpg", "--format", "png"], "a.jpg is jpeg by its suffix, but format='png'"),
        (["--out", "{tmp}/file"], "file is a file: choose a folder"),
        (["--out", "/proc/a.png"], "/proc cannot be written to (No such file or directory): choose another folder"),
        (["--out", "{tmp}/taken.png"], "taken.png is there, and made otherwise: remove it"),
        (["--prompt", "x" * 70_000, "--format", "jpeg"], "a JPEG holds 65000: use png or webp"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:40],
)
def test_sample_reports_bad_input_in_one_line_and_makes_nothing(
    arguments, message, drawn, tmp_path, monkeypatch, capsys
):
    for name in ("file", "taken.png"):
        (tmp_path / name).touch()
    monkeypatch.delattr(Pipeline, "sample")
    words = [word.format(tmp=tmp_path) for word in arguments]
    assert cli.main([*drawn, "--out", str(tmp_path / "out"), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dfa2 sample: ") and message in line


def test_every_encoder_has_its_prompt_and_every_image_its_seed(drawn, tmp_path, capsys):
    words = ["--prompt", "b", "--prompt-2", "c", "--prompt-2", "d", "--num-images-per-prompt", "2", "--seed", "5"]
    assert cli.main([*drawn, *words, "--batch", "3", "--height", "64", "--width", "64", "--out", str(tmp_path)]) == 0
    made = [read_metadata(Path(path)) for path in capsys.readouterr().out.splitlines()]
    assert [(one["prompt"], one["prompt_2"], one["seed"]) for one in made] == [
        (PROMPT, "c", 5), (PROMPT, "c", 6), ("b", "d", 5), ("b", "d", 6),
    ]  # fmt: skip
    assert made[3]["batch"]["seed"] == [6, 6, 6] and made[3]["image"] == 0


def test_one_image_may_go_to_a_file_that_is_made_once(drawn, tmp_path, capsys):
    out = tmp_path / "new" / "cat.webp"
    assert cli.main([*drawn, "--out", str(out)]) == 0 and cli.main([*drawn, "--out", str(out)]) == 0
    assert capsys.readouterr() == (f"{out}\n" * 2, f"skipped {out}: it is made already\n")
    assert cli.main([*drawn, "--out", str(out), "--seed", "1"]) == 2
    assert "is there, and made otherwise" in capsys.readouterr().err and read_metadata(out)["seed"] == 0


def test_sample_of_no_folder_and_no_prompt(tmp_path, cache, capsys):
    assert cli.main(["sample", str(tmp_path / "absent"), "--prompt", PROMPT, "--out", str(tmp_path)]) == 2
    assert "absent is not a folder" in capsys.readouterr().err
    assert cli.main(["sample", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 2
    assert "pass --prompt TEXT or --prompts FILE" in capsys.readouterr().err


def test_lines_of_a_prompt_file_end_where_editors_end_them(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a\u2028b\n\n \nc\x0bd\x0c\r\ne\u0085f\rg\x1c\n".encode())
    assert start.read_prompts(path) == ["a\u2028b", "c\x0bd\x0c", "e\u0085f", "g\x1c"]


def test_a_path_beyond_an_ascii_stdout_is_printed_byte_for_byte(drawn, tmp_path, monkeypatch):
    """PYTHONIOENCODING=ascii, cron."""
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main([*drawn, "--prompt", "rouge \u00e9 \u7ea2", "--format", "jpeg", "--out", str(tmp_path)]) == 0
    printed = stream.buffer.getvalue().splitlines()
    assert printed[1] == os.fsencode(tmp_path / "rouge-\u00e9-\u7ea2-seed0-0.jpg")
    assert len(printed) == 2 and all(os.path.exists(path) for path in printed)
    print("\u7ea2", end="", flush=True)
    assert stream.buffer.getvalue().endswith(rb"\u7ea2"), "other text must not raise"


def test_without_a_home_compiled_programs_are_not_kept(monkeypatch, cache, capsys):
    """A container under a user id without an entry in passwd."""
    import pwd

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def absent(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", absent)
    start.start()
    assert "not kept; set JAX_COMPILATION_CACHE_DIR" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_a_cache_that_cannot_be_written_is_one_line(name, monkeypatch, cache, capsys):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv(name, "/proc/cache")
    start.start()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiled programs are not kept") and "/proc/cache" in line
    assert jax.config.jax_compilation_cache_dir is None
