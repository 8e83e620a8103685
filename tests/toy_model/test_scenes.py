"""The drawn scenes and their checker: ground truth scores 100 %, shuffled captions score what guessing would."""

from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("toy", reason="toy/ is beside the tests in a checkout alone")
scenes = import_module("toy.scenes")
checker = import_module("toy.checker")

pytestmark = pytest.mark.checkout

draw = jax.jit(scenes.draw, static_argnames="size")


def drawn(indices, size, seed=0):
    numbers = jnp.asarray(scenes.number_table()[indices])
    return np.asarray(draw(numbers, jax.random.key(seed), size=size))


@pytest.mark.parametrize("size", [64, 128])
def test_ground_truth_scores_everything(size):
    _, _, held_out = scenes.split()
    images = drawn(held_out, size)
    scores = [checker.score(image, scene) for image, scene in zip(images, scenes.held_out(), strict=True)]
    assert all((score.background, score.colour, score.shape) == (1, 1, 1) for score in scores)
    ious = [score.iou for score in scores]
    assert np.mean(ious) > 0.985 and min(ious) > 0.85


def test_ground_truth_under_the_noise_of_a_good_sampler_still_scores_everything():
    held_out = scenes.split()[2][:60]
    images = drawn(held_out, 128) + np.random.RandomState(0).normal(0, 0.05, (60, 128, 128, 3))
    mean = checker.mean_score(images, scenes.held_out()[:60])
    assert (mean.background, mean.colour) == (1, 1) and mean.iou > 0.95


def test_shuffled_captions_score_what_guessing_would():
    """A guess is right for one of 8 colours. A thing must also be at its place, and its shape is one of 6."""
    images = drawn(scenes.split()[2], 64)
    shuffled = np.random.RandomState(0).permutation(len(images))
    mean = checker.mean_score(images[shuffled], scenes.held_out())
    assert 0.05 < mean.background < 0.2
    assert mean.colour < 0.15 and mean.shape < 0.1 and mean.iou < 0.1


WRONG = {
    "background": ("a large red circle on the left of a white background", (0, 1, 1)),
    "colour": ("a large blue circle on the left of a black background", (1, 0, 0)),
    "place": ("a large red circle on the right of a black background", (1, 0, 0)),
    "shape": ("a large red square on the left of a black background", (1, 1, 0)),
    "none": ("a large red circle on the left of a black background", (1, 1, 1)),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_fault_costs_its_own_score(case):
    captions = {scene.caption: i for i, scene in enumerate(scenes.scenes())}
    asked, want = WRONG[case]
    truth = captions["a large red circle on the left of a black background"]
    image = drawn(np.array([truth]), 128)[0]
    score = checker.score(image, scenes.scenes()[captions[asked]])
    assert (score.background, score.colour, score.shape) == want
    assert (score.iou > 0.97) == (case in ("none", "background"))


def test_swapped_things_are_wrong_and_other_sizes_overlap_less():
    captions = {scene.caption: i for i, scene in enumerate(scenes.scenes())}

    def score(truth, asked):
        image = drawn(np.array([captions[truth]]), 128)[0]
        return checker.score(image, scenes.scenes()[captions[asked]])

    pair = "a {} star left of a {} ring on a white background"
    assert score(pair.format("red", "green"), pair.format("red", "green")).colour == 1
    assert score(pair.format("green", "red"), pair.format("red", "green")).colour == 0
    single = "a {} red star in the centre of a white background"
    assert score(single.format("small"), single.format("large")).iou < 0.6


def test_a_seed_moves_what_the_caption_leaves_open():
    twice = np.repeat(scenes.split()[2][:1], 2)
    first, second = drawn(twice, 64)
    assert np.abs(first - second).mean() > 0.01
    np.testing.assert_array_equal(drawn(twice, 64), drawn(twice, 64))


def test_resolutions_draw_one_scene():
    some = scenes.split()[2][:20]
    coarse, fine = drawn(some, 64), drawn(some, 128)
    halved = fine.reshape(20, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(coarse - halved).mean() < 0.005


def test_held_out_captions_are_200_and_never_trained_on():
    singles, pairs, held_out = scenes.split()
    assert len(set(held_out)) == 200 and not set(held_out) & (set(singles) | set(pairs))
    assert len(singles) + len(pairs) + 200 == len(scenes.scenes())
    captions = [scene.caption for scene in scenes.scenes()]
    assert len(set(captions)) == len(captions)
    both = [len(scene.things) for scene in scenes.held_out()]
    assert both == [1, 2] * 100
