"""Video files: frames, durations and metadata come back, and what cannot be written is named before work is done."""

import io
import json
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features

from dfa2_jax.io import videos
from dfa2_jax.io.extras import MissingExtra
from dfa2_jax.io.images import EXIF_FOLDER, MAKER_NOTE, USER_COMMENT, read_metadata
from dfa2_jax.io.videos import contact_sheet, durations, save_video

METADATA = {"prompt": "ein Pfeil \u2192 rechts", "seed": 3, "fps": 15}
PARAMETERS = "ein Pfeil \u2192 rechts\nSteps: 50"

NEEDS_AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
PILLOW = [".webp", ".png", ".apng", ".gif", pytest.param(".avif", marks=NEEDS_AVIF)]


def clip(count=7, height=32, width=48):
    """A bright square that moves over a gradient."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 150, width)
    frames[..., 2] = np.linspace(20, 120, height)[:, None]
    for number, frame in enumerate(frames):
        frame[8:20, 3 * number : 3 * number + 12] = (240, 200, 40)
    return frames


def read_frames(path):
    """Frames uint8 [F, H, W, 3], their durations in milliseconds, and how often they are shown, of a file by Pillow."""
    frames, shown = [], []
    with Image.open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
            shown.append(image.info["duration"])
        return np.stack(frames), shown, image.info.get("loop")


def error(frames, others):
    return float(np.abs(frames.astype(float) - others.astype(float)).mean())


@pytest.mark.parametrize("suffix", PILLOW)
def test_frames_come_back_in_order(suffix, tmp_path):
    path = tmp_path / f"clip{suffix}"
    assert save_video(clip(), path, fps=15) == path
    frames, shown, loop = read_frames(path)
    limit = {".png": 0, ".apng": 0, ".gif": 6}.get(suffix, 4)  # of 255: lossless, 256 colours, lossy
    assert frames.shape == clip().shape and error(frames, clip()) <= limit
    assert error(frames, clip()[::-1]) > 2 * limit
    assert round(sum(shown)) == (470 if suffix == ".gif" else 467) and loop in (0, None)
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", PILLOW)
def test_pil_images_give_the_same_file(suffix, tmp_path):
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    save_video(clip(), one, fps=8)
    save_video([Image.fromarray(frame).convert("RGBA") for frame in clip()], str(two), fps=8)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("suffix", PILLOW)
def test_frames_that_stand_still_last_as_long(suffix, tmp_path):
    frames = clip()
    frames[1:4] = frames[0]
    save_video(frames, tmp_path / f"still{suffix}", fps=8)
    assert round(sum(read_frames(tmp_path / f"still{suffix}")[1])) in (870, 875, 880)


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_metadata_is_where_images_have_it(suffix, tmp_path):
    path = tmp_path / f"clip{suffix}"
    save_video(clip(), path, fps=15, metadata=METADATA, parameters=PARAMETERS)
    assert read_metadata(path) == METADATA
    with Image.open(path) as image:
        image.load()
        assert image.n_frames == 7
        if suffix == ".png":
            assert image.text["parameters"] == PARAMETERS
        else:
            said = image.getexif().get_ifd(EXIF_FOLDER)[USER_COMMENT]
            assert said == b"UNICODE\0" + PARAMETERS.encode("utf-16-be")


@NEEDS_AVIF
def test_metadata_is_in_avif_too(tmp_path):
    save_video(clip(), tmp_path / "clip.avif", fps=15, metadata=METADATA)
    with Image.open(tmp_path / "clip.avif") as image:
        assert json.loads(image.getexif().get_ifd(EXIF_FOLDER)[MAKER_NOTE]) == METADATA


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_one_frame_is_a_video_too(suffix, tmp_path):
    save_video(clip(1), tmp_path / f"clip{suffix}", fps=8, metadata=METADATA)
    with Image.open(tmp_path / f"clip{suffix}") as image:
        assert image.n_frames == 1 and image.size == (48, 32)


@pytest.mark.parametrize("tick_ms", [1, 10])
@pytest.mark.parametrize("fps", [1, 8, 15, 16, 23.976, 24, 29.97, 30, 50])
def test_durations_add_up(fps, tick_ms):
    """Each frame begins within half a tick of its time, so that no rounding adds up."""
    shown = durations(161, fps, tick_ms)
    assert len(shown) == 161 and all(time >= tick_ms and time % tick_ms == 0 for time in shown)
    for count in range(162):
        assert abs(sum(shown[:count]) - count * 1000 / Fraction(fps)) <= Fraction(tick_ms, 2) + Fraction(1, 10**6)


def test_durations_of_15_frames_a_second():
    assert durations(6, 15, 1) == [67, 66, 67, 67, 66, 67] and sum(durations(15, 15, 1)) == 1000


@pytest.mark.parametrize(
    ("name", "fps", "message"),
    [
        ("clip.mov", 8, r"clip.mov has the suffix '.mov', which is none of .webp, .avif, .gif, .png, .apng, .mp4"),
        ("clip", 8, "has the suffix '', which is none of .webp"),
        ("clip.gif", 60, "fps=60 is not from 1 to 50, the frames a second that .gif takes"),
        ("clip.webp", 0, "fps=0 is not from 1 to 1000"),
        ("clip.webp", -8, "fps=-8 is not"),
        ("clip.webp", float("nan"), "fps=nan is not"),
        ("clip.webp", float("inf"), "fps=inf is not"),
    ],
)
def test_suffixes_and_rates_are_checked(name, fps, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_video(clip(), tmp_path / name, fps=fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (clip().astype(np.float32) / 255, r"frames are float32 \[7, 32, 48, 3\], not uint8 \[F, H, W, 3\]"),
        (clip()[0], r"uint8 \[32, 48, 3\]"),
        (clip()[..., :2], r"uint8 \[7, 32, 48, 2\]"),
        (clip()[:0], r"uint8 \[0, 32, 48, 3\]"),
        ([], r"frames are .* \[0\]"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 6))], r"different sizes, such as \(4, 4\) and \(4, 6\)"),
    ],
)
def test_what_is_no_frames_is_named(frames, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_video(frames, tmp_path / "clip.webp", fps=8)
    with pytest.raises(ValueError, match=message):
        contact_sheet(frames)


def test_the_folder_is_looked_at_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "animation", lambda *_: pytest.fail("the frames were encoded"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_video(clip(), tmp_path / "absent" / "clip.webp", fps=8)


def test_a_failure_keeps_the_older_file(tmp_path, monkeypatch):
    save_video(clip(), path := tmp_path / "clip.webp", fps=8)
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_video(clip(3), path, fps=8)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_pillow_without_avif_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    with pytest.raises(ValueError, match="this Pillow lacks avif: choose .png or .gif"):
        save_video(clip(), tmp_path / "clip.avif", fps=8)


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """In ffmpeg's place, a script. It gets its options as $options, and the file to write as $file."""

    def write(script):
        program = tmp_path / "program" / "ffmpeg"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\noptions="$*"\nfor file; do :; done\n{script}\n')
        program.chmod(0o755)
        module = SimpleNamespace(get_ffmpeg_exe=lambda: str(program))
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", module)

    return write


def test_ffmpeg_gets_the_frames_and_the_file(ffmpeg, tmp_path):
    ffmpeg('echo "$options" > "$file"; cat >> "$file"')
    (folder := tmp_path / "out").mkdir()
    view = clip(height=34)[:, ::-1]  # its bytes do not lie in order
    save_video(view, folder / "clip.mp4", fps=7.5)
    options, _, pixels = (folder / "clip.mp4").read_bytes().partition(b"\n")
    assert b"-pix_fmt rgb24 -video_size 48x34 -framerate 7.5 -i pipe:0" in options
    assert b"-c:v libx264 -pix_fmt yuv420p" in options
    assert pixels == view.tobytes() and len(list(folder.iterdir())) == 1


def test_an_error_of_ffmpeg_leaves_no_file(ffmpeg, tmp_path):
    ffmpeg('echo half > "$file"; echo "Unknown encoder" >&2; exit 3')
    (folder := tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="ffmpeg ended with code 3: Unknown encoder"):
        save_video(clip(), folder / "clip.mp4", fps=8)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47)])
def test_mp4_refuses_odd_sizes(height, width, tmp_path):
    with pytest.raises(ValueError, match=f"height={height} and width={width} must be even for .mp4"):
        save_video(clip(height=height, width=width), tmp_path / "clip.mp4", fps=8)


def test_mp4_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingExtra, match=r"a video in .mp4 needs imageio_ffmpeg: pip install 'dfa2-jax\[video\]'"):
        save_video(clip(), tmp_path / "clip.mp4", fps=8)
    assert not list(tmp_path.iterdir())


def test_an_mp4_is_what_ffmpeg_reads(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="the extra `video` is not in the locked environments")
    frames = clip(25, 64, 96)
    save_video(frames, path := tmp_path / "clip.mp4", fps=12.5)
    said = subprocess.run([ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, text=True).stderr
    assert "h264" in said and "yuv420p(tv, bt709" in said and "Duration: 00:00:02.00" in said and "12.50 fps" in said
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat"), "a browser shows it while it loads"
    command = [ffmpeg.get_ffmpeg_exe(), *f"-loglevel error -i {path} -f rawvideo -pix_fmt rgb24 pipe:1".split()]
    shown = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    assert error(shown.reshape(frames.shape), frames) < 4 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("count", "columns", "size", "numbers"),
    [
        (1, None, (48, 32), [0]),
        (3, None, (96, 64), [0, 1, 2]),
        (7, 3, (144, 96), range(7)),
        (7, 99, (336, 32), range(7)),
        (12, 1, (48, 384), range(12)),
        (23, None, (192, 96), range(0, 23, 2)),
        (49, None, (192, 96), [0, 4, 9, 13, 17, 22, 26, 31, 35, 39, 44, 48]),
    ],
)
def test_a_contact_sheet_has_frames_from_the_first_to_the_last(count, columns, size, numbers):
    frames = np.broadcast_to(np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None], (count, 32, 48, 3))
    sheet = contact_sheet(frames, columns)
    assert sheet.size == size
    cells = np.asarray(sheet)[::32, ::48, 0].reshape(-1)
    assert cells[: len(numbers)].tolist() == [number + 1 for number in numbers]
    assert not cells[len(numbers) :].any()


def test_a_contact_sheet_needs_a_column():
    with pytest.raises(ValueError, match="columns=0 must be 1 or more"):
        contact_sheet(clip(), 0)


def test_a_contact_sheet_of_images_is_that_of_their_pixels():
    file = io.BytesIO()
    contact_sheet([Image.fromarray(frame) for frame in clip()]).save(file, "PNG")
    assert (np.asarray(Image.open(file)) == np.asarray(contact_sheet(clip()))).all()
