"""What a call returns: images that are saved with what they are, and what runs ahead of the bar."""

import errno
import json
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from dfa2_jax import Output, Plan
from dfa2_jax.io.images import read_metadata
from dfa2_jax.options import Options
from dfa2_jax.pipeline.ahead import compile_ahead
from dfa2_jax.pipeline.output import image_metadata, metadata, options_again, parameters
from dfa2_jax.pipeline.request import seeds_of

MADE = {
    "prompt": ["a red circle", "\u7ea2 & caf\u00e9"],
    "negative_prompt": "blurry",
    "num_images_per_prompt": 1,
    "num_inference_steps": 20,
    "guidance_scale": 4.5,
    "cfg_scale": 4.5,
    "embedded_guidance": None,
    "seed": [3, 2**63],
    "width": 96,
    "height": 64,
    "folder": "hub/models--owner--some-model/snapshots/c0ffee",
    "versions": {"dfa2_jax": "1.2"},
}


@pytest.fixture
def output():
    pixels = np.random.default_rng(0).random((2, 64, 96, 3), np.float32)
    return Output(pixels, MADE["seed"], {}, MADE)


def comment(path):
    """The text of an image that other tools read."""
    with Image.open(path) as image:
        if image.format == "PNG":
            return image.text["parameters"]
        value = image.getexif().get_ifd(0x8769)[0x9286]
    assert value.startswith(b"UNICODE\0")
    return value[8:].decode("utf-16-be")


@pytest.mark.parametrize("number", [-1, 2])
def test_an_image_that_is_not_there_is_not_written(number, output, tmp_path):
    with pytest.raises(ValueError, match=rf"numbers=\[{number}\] are none of these 2 images"):
        output.save(tmp_path, numbers=[0, number])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "suffix"), [("png", ".png"), ("webp", ".webp"), ("jpeg", ".jpg")])
def test_an_image_keeps_what_it_is_in_every_format(kind, suffix, output, tmp_path):
    paths = output.save(tmp_path / "new" / "folder", format=kind)
    assert [path.name for path in paths] == [f"a-red-circle-seed3-0{suffix}", f"\u7ea2-caf\u00e9-seed{2**63}-0{suffix}"]
    for i, path in enumerate(paths):
        made = read_metadata(path)
        assert made == image_metadata(MADE, i) and made["prompt"] == MADE["prompt"][i] and made["image"] == i
        assert made["seed"] == MADE["seed"][i] and made["batch"]["seed"] == MADE["seed"]
        assert comment(path) == (
            f"{MADE['prompt'][i]}\nNegative prompt: blurry\nSteps: 20, Sampler: Euler, CFG scale: 4.5, "
            f"Seed: {MADE['seed'][i]}, Size: 96x64, Model: some-model, Version: dfa2_jax 1.2"
        )
        with Image.open(path) as image:
            error = np.abs(np.asarray(image, np.float32) / 255 - output.images[i]).mean()
        assert error < (0.003 if kind == "png" else 0.2)


def test_embedded_guidance_is_no_cfg():
    said = parameters(image_metadata(MADE | {"cfg_scale": None, "embedded_guidance": 3.5, "negative_prompt": None}, 0))
    assert "CFG scale: 1, Distilled CFG Scale: 3.5," in said and "Negative" not in said


def test_a_path_is_a_file_for_one_image_and_a_folder_for_more(output, tmp_path):
    with pytest.raises(ValueError, match="cat.png is one file for 2 images: give a folder"):
        output.save(tmp_path / "cat.png")
    assert output.save(tmp_path / "cat.JPG", numbers=[1]) == [tmp_path / "cat.JPG"]
    assert read_metadata(tmp_path / "cat.JPG")["image"] == 1
    (tmp_path / "folder.png").mkdir()
    assert {path.parent for path in output.save(str(tmp_path / "folder.png"))} == {tmp_path / "folder.png"}
    with pytest.raises(ValueError, match="format='gif' is not one of"):
        output.save(tmp_path, format="gif")
    with pytest.raises(ValueError, match="latents .* are no images"):
        Output(np.zeros((1, 16, 8, 8)), [0], {}, MADE).save(tmp_path)


def test_an_image_is_written_as_a_whole_or_not_at_all(output, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("os.fsync", fail)
        output.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_writers_of_one_name_take_turns(output, tmp_path):
    threads = [threading.Thread(target=output.save, args=(tmp_path,), kwargs={"numbers": [0]}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a-red-circle-seed3-{i}.png" for i in range(8)]
    assert all(read_metadata(path)["seed"] == 3 for path in tmp_path.iterdir())


def test_a_name_fits_the_file_system(output, tmp_path, monkeypatch):
    long = Output(output.images[:1], [0], {}, MADE | {"prompt": ["\U00020000" * 300], "seed": [2**64 - 1]})
    (path,) = long.save(tmp_path)
    assert path.exists() and len(path.name.encode()) < 200
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    assert output.save(tmp_path, numbers=[1])[0].name == f"caf-seed{2**63}-0.png"


def test_the_bar_hides_no_compilation(compilations, pipelines):
    pipeline = pipelines("tiny_sd35")
    size = {"height": 48, "width": 80, "num_inference_steps": 2, "max_sequence_length": 16}
    plan = Plan.full(pipeline.setting(prompt="a", **size))
    call = pipeline.prepare(Options(prompt="a", plan=plan, **size))
    jax.clear_caches()  # whatever other tests compiled
    before = len(compilations)
    compile_ahead(call)
    ahead = len(compilations)
    call.images(call.run())
    assert ahead > before and len(compilations) == ahead


def test_seeds_are_taken_as_they_come_and_recorded_whole(no_shape_checks, pipelines):
    """torch.seed() gives numbers beyond int64; a list of both kinds is float64 to NumPy."""
    seeds = [2**63, np.uint64(2**64 - 1), np.int32(1)]
    assert seeds_of(seeds, 3) == seeds_of(np.array(seeds, np.uint64), 3) == [2**63, 2**64 - 1, 1]
    assert seeds_of(np.int64(5), 2) == [5, 5]
    for wrong in ([1, True], [2**64], [1.0], "3"):
        with pytest.raises(ValueError, match="must be an integer"):
            seeds_of(wrong, len(wrong))
    pipeline = pipelines("tiny_sd35")
    asked = Options(prompt=["a", "b", "c"], seed=seeds, sigmas=[1, np.float32(0.5)], height=64, width=64)
    request = pipeline.request(asked)
    made = json.loads(json.dumps(metadata(pipeline, asked, request)))
    assert made["seed"] == [2**63, 2**64 - 1, 1] and made["sigmas"] == [1.0, 0.5]
    again = options_again(image_metadata(made, 1), None)
    assert metadata(pipeline, again, pipeline.request(again)) == made
