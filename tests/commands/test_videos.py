"""`dfa2 sample` and `dfa2 again` of a video model."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageSequence

from dfa2_jax import Pipeline, cli
from dfa2_jax.commands import again
from dfa2_jax.commands.previews import frames_in
from dfa2_jax.io.images import read_metadata
from dfa2_jax.io.videos import save_video
from dfa2_jax.pipeline.components import Component

PROMPT = "a red ring"
SIZE = ["--height", "32", "--width", "48"]
VIDEO = ["--num-frames", "9", "--fps", "8", "--steps", "2"]


@pytest.fixture(autouse=True)
def own_cache(cache):
    return cache


@pytest.fixture
def image_model(pipelines):
    return pipelines("tiny_sd35")


@pytest.fixture
def sample(pipelines, monkeypatch, tiny_cogvideox_5b):
    pipeline = pipelines("tiny_cogvideox_5b")
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, **options: pipeline)
    return ["sample", str(tiny_cogvideox_5b), "--prompt", PROMPT, *SIZE, *VIDEO]


def frames_of(path):
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def test_a_video_is_made_once_and_made_again_bit_for_bit(sample, tmp_path, capsys):
    out = tmp_path / "videos"
    assert cli.main([*sample, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    path = out / "a-red-ring-seed0-0.webp"
    assert printed.out == f"{path}\n" and [*out.iterdir()] == [path]
    told = [printed.err.index(words) for words in ("\rencoding ", "denoise:", "decode:")]
    assert sorted(told) == told
    made = read_metadata(path)
    assert made["num_frames"] == 9 and made["fps"] == 8 and made["num_inference_steps"] == 2
    assert made["pipeline"] == "CogVideoXPipeline" and made["prompt"] == PROMPT
    assert frames_of(path).shape == (9, 32, 48, 3)
    before = path.read_bytes()

    assert cli.main([*sample, "--quiet", "--out", str(out)]) == 0
    assert capsys.readouterr() == (f"{path}\n", f"skipped {path}: it is made already\n")
    assert [*out.iterdir()] == [path]

    other = tmp_path / "again"
    assert cli.main(["again", str(path), "--quiet", "--out", str(other)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{other / path.name}\n" and printed.err.endswith("bit for bit\n")
    assert read_metadata(other / path.name) == made and path.read_bytes() == before
    np.testing.assert_array_equal(frames_of(other / path.name), frames_of(path))


def test_an_interrupted_decoder_leaves_no_file_and_the_next_run_makes_it(sample, tmp_path, capsys, monkeypatch):
    out, carry, words = tmp_path / "videos", Component.carry, [*sample, "--quiet", "--num-frames", "25"]

    def interrupted(*args, **options):
        carry(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Component, "carry", interrupted)
        assert cli.main([*words, "--out", str(out)]) == 130
    assert not [*out.rglob("*")] and capsys.readouterr() == ("", "dfa2 sample: interrupted\n")
    assert cli.main([*words, "--out", str(out)]) == 0
    (path,) = out.iterdir()
    assert frames_of(path).shape == (25, 32, 48, 3)


@pytest.mark.parametrize("form", ["png", "gif"])
def test_a_preview_lies_beside_each_video(form, sample, tmp_path, capsys):
    """A run that finds the video makes a sheet that is not there."""
    out = tmp_path / "videos"
    words = [*sample, "--quiet", "--format", form, "--preview", "--out", str(out)]
    assert cli.main(words) == 0
    path, sheet = out / f"a-red-ring-seed0-0.{form}", out / "a-red-ring-seed0-0.preview.png"
    assert capsys.readouterr().out == f"{path}\n" and {*out.iterdir()} == {path, sheet}
    drawn = frames_of(sheet)
    assert drawn.shape == (1, 3 * 32, 3 * 48, 3)
    if form == "gif":
        return
    tiles = drawn.reshape(3, 32, 3, 48, 3).swapaxes(1, 2).reshape(9, 32, 48, 3)
    np.testing.assert_array_equal(tiles, frames_of(path))

    sheet.unlink()
    assert cli.main(words) == 0
    assert f"skipped {path}" in capsys.readouterr().err and {*out.iterdir()} == {path, sheet}
    np.testing.assert_array_equal(frames_of(sheet), drawn)


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif"])
def test_a_frame_that_lasts_longer_stands_for_equal_ones(suffix, tmp_path):
    shades = np.array([9, 9, 9, 90, 90, 200], np.uint8)
    video = np.broadcast_to(shades[:, None, None, None], (6, 16, 16, 3))
    path = save_video(np.ascontiguousarray(video), tmp_path / f"clip{suffix}", fps=8)
    read = np.asarray(frames_in(path, 8)).astype(int)
    assert read.shape == video.shape and np.abs(read - video).max() <= 3


@pytest.mark.parametrize("suffix", [".avif", ".png"])
def test_a_video_of_another_format_is_found_too(suffix, sample, tmp_path, capsys):
    out = tmp_path / f"clip{suffix}"
    assert cli.main([*sample, "--quiet", "--out", str(out)]) == cli.main([*sample, "--quiet", "--out", str(out)]) == 0
    assert f"skipped {out}" in capsys.readouterr().err
    assert cli.main([*sample, "--quiet", "--out", str(out), "--fps", "9"]) == 2
    assert "is there, and made otherwise" in capsys.readouterr().err


def test_every_frame_is_compared(tmp_path, capsys):
    frames = np.random.default_rng(0).integers(256, size=(5, 16, 16, 3), dtype=np.uint8)
    other = frames.copy()
    other[3, 2, 1] ^= 4
    files = [save_video(x, tmp_path / f"{i}.png", fps=8) for i, x in enumerate((frames, other, frames[:4]))]
    assert again.compare(files[0], files[0]) == 0 and again.compare(files[0], files[1]) == 1
    assert "in 3 of 3840 values, by at most 4 of 255" in capsys.readouterr().err
    assert again.compare(files[0], files[2]) == 1
    assert "2.png has 4 frames of 16 x 16, and" in capsys.readouterr().err


def test_a_model_makes_what_it_makes(image_model, sample, monkeypatch, tmp_path, capsys):
    monkeypatch.delattr(Pipeline, "sample")
    assert cli.main([*sample, "--format", "jpeg", "--quiet", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "format='jpeg' is not one of ['avif', 'gif', 'mp4', 'png', 'webp'], which videos can be written in" in line
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, **options: image_model)
    words = ["sample", "folder", "--prompt", PROMPT, "--quiet", "--out"]
    for more, message in (
        (
            [str(tmp_path / "out"), "--format", "mp4"],
            "format='mp4' is not one of ['jpeg', 'png', 'webp'], which images",
        ),
        ([str(tmp_path / "a.gif")], "a.gif has the suffix of a format that images are not written in: .png, .webp"),
        ([str(tmp_path / "out"), "--preview"], "--preview draws frames of videos: this model makes images"),
        ([str(tmp_path / "out"), "--num-frames", "9"], "num_frames=9 is for video models: this one makes images"),
    ):
        assert cli.main([*words, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("dfa2 sample: ") and message in line
    assert not [*tmp_path.rglob("*.*")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "gif", "--fps", "60"], "fps=60 is not from 1 to 50, the frames a second that .gif takes"),
        (["--format", "mp4"], "a video in .mp4 needs imageio_ffmpeg"),
    ],
)
def test_what_a_format_does_not_take_is_said_before_sampling(words, said, sample, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(Pipeline, "sample", lambda *_: pytest.fail("a video was sampled"))
    assert cli.main([*sample, "--quiet", *words, "--out", str(tmp_path / "videos")]) == 2
    assert said in capsys.readouterr().err


def test_a_gif_cannot_be_found_again_and_that_is_said(sample, tmp_path, capsys):
    out = tmp_path / "videos"
    for count in (1, 2):
        assert cli.main([*sample, "--quiet", "--format", "gif", "--out", str(out)]) == 0
        assert "gif does not say how it was made: videos that are there are made again" in capsys.readouterr().err
        assert len([*out.iterdir()]) == count
    (file := tmp_path / "one.gif").write_bytes(b"")
    assert cli.main([*sample, "--quiet", "--out", str(file)]) == 2
    assert "one.gif is there, and gif does not say how it was made" in capsys.readouterr().err
