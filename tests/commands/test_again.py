"""`dfa2 again`: an image made anew from what it says of itself."""

import numpy as np
import pytest
from PIL import Image

from dfa2_jax import Pipeline, Plan, cli
from dfa2_jax.commands import again
from dfa2_jax.io.images import encode, read_metadata


@pytest.fixture(scope="module")
def pipeline(pipelines):
    return pipelines("tiny_sd35")


@pytest.fixture(scope="module")
def image(pipeline, tmp_path_factory):
    """The second of a batch of two, by a plan."""
    folder = tmp_path_factory.mktemp("made")
    setting = pipeline.setting(prompt="a", height=64, width=96, num_inference_steps=2, max_sequence_length=16)
    plan = Plan.full(setting).with_method(1, None, [0], "cached")
    plan.save(folder / "plan.json")
    output = pipeline(["a circle", "a star"], negative_prompt="blurry", seed=[9, 8], plan=plan, progress=False)
    output.metadata["plan_file"] = str(folder / "plan.json")
    return output.save(folder, format="webp")[1]


@pytest.fixture
def loaded(pipeline, monkeypatch):
    """A model that needs no time to load."""
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda folder, **options: pipeline)


@pytest.fixture(autouse=True)
def own_cache(cache):
    return cache


def edited(image, folder, changes):
    """The image, saying something else of itself."""
    path = folder / "edited.png"
    with Image.open(image) as pixels:
        path.write_bytes(encode(pixels, "png", read_metadata(image) | changes, ""))
    return path


def test_an_image_is_made_anew_bit_for_bit(image, tmp_path, capsys):
    assert cli.main(["again", str(image), "--quiet", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    made = tmp_path / image.name
    assert printed.out == f"{made}\n" and printed.err.endswith("bit for bit\n")
    assert read_metadata(made) == read_metadata(image)
    assert cli.main(["again", str(image), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{image.with_name('a-star-seed8-1.webp')}\n"


def test_a_file_that_is_there_is_not_replaced(image, loaded, tmp_path, monkeypatch, capsys):
    """It may be the image itself, which then had its own pixels, bit for bit."""
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    changed, link, text = edited(image, tmp_path, {}), tmp_path / "link.png", tmp_path / "precious.png"
    link.symlink_to(changed)
    text.write_text("precious")
    before = changed.read_bytes()
    for out in (changed, link, text):
        assert cli.main(["again", str(changed), "--quiet", "--out", str(out)]) == 2
        assert f"--out {out} is there: choose another name, or a folder" in capsys.readouterr().err
    assert changed.read_bytes() == before and text.read_text() == "precious"


def test_the_suffix_of_a_new_file_is_its_format(image, loaded, tmp_path, capsys):
    made = tmp_path / "made.png"
    assert cli.main(["again", str(image), "--quiet", "--out", str(made)]) == 1, "WebP has lost some of the pixels"
    assert capsys.readouterr().out == f"{made}\n" and made.read_bytes().startswith(b"\x89PNG")


def test_other_pixels_and_other_versions_are_told(image, loaded, tmp_path, capsys):
    changed = edited(image, tmp_path, {"versions": {"jax": "0.1"}, "guidance_scale": 2.0})
    assert cli.main(["again", str(changed), "--quiet"]) == 1
    told = capsys.readouterr().err
    assert "versions was {'jax': '0.1'}, and is {'dfa2_jax'" in told and "differs from" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "f00"}, "was made with weights f00, and"),
        ({"folder": None}, "names no folder of its model: dfa2 again"),
        ({"plan": "f00"}, "was made by plan f00, and"),
        ({"plan_file": "absent.json"}, "absent.json, which is not there: pass --plan FILE"),
        ({"plan_file": None}, "does not name its file: pass --plan FILE"),
        ({"attend": "Mine()"}, "was made with attend=Mine(), which its metadata does not hold"),
        ({"latents": "array[1, 16, 8, 8]"}, "was made with latents=array"),
        ({"image": 7}, "image 7 of 2"),
        ({"image": "x"}, "cannot be made again"),
        ({"batch": 3}, "cannot be made again"),
        ({"height": "64"}, "height='64' must be a positive integer"),
    ],
    ids=str,
)
def test_what_cannot_be_made_again_is_told_in_one_line(changes, message, image, loaded, tmp_path, capsys):
    assert cli.main(["again", str(edited(image, tmp_path, changes)), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dfa2 again: ") and message in line


def test_a_file_that_does_not_say_how_it_was_made(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("other.png", "does not say how it was made"), ("text.png", "cannot be read")):
        assert cli.main(["again", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_pixels_are_compared_one_by_one(tmp_path, capsys):
    pixels = np.zeros((4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pixels[1, 2, 0] = 3
    Image.fromarray(pixels).save(tmp_path / "b.png")
    Image.fromarray(pixels[:2]).save(tmp_path / "c.png")
    files = [tmp_path / f"{name}.png" for name in "abc"]
    assert again.compare(files[0], files[0]) == 0 and again.compare(files[0], files[1]) == 1
    assert "1 of 48 values, by at most 3 of 255" in capsys.readouterr().err
    assert again.compare(files[0], files[2]) == 1
    assert "has 1 frames of 4 x 2, and" in capsys.readouterr().err
