"""The moving shapes and their checker: drawn videos score 100 %, shuffled captions score what guessing would."""

from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("toy", reason="toy/ is beside the tests in a checkout alone")
scenes = import_module("toy.video_scenes")
checker = import_module("toy.video_checker")

pytestmark = pytest.mark.checkout

FRAMES = 17
draw = jax.jit(scenes.draw, static_argnames=("size", "frames"))


def drawn(indices, size=64, seed=0, frames=FRAMES):
    numbers = jnp.asarray(scenes.number_table()[indices])
    return np.asarray(draw(numbers, jax.random.key(seed), size=size, frames=frames))


def index_of(scene):
    """The row of a scene in the table."""
    names = scenes.COLOURS, scenes.SHAPES, tuple(scenes.DIRECTIONS), tuple(scenes.SPEEDS)
    numbers = [names[0].index(scene.background)]
    for mover in scene.movers:
        numbers += [table.index(word) for table, word in zip(names, mover, strict=True)]
    numbers += [0] * (9 - len(numbers)) + [len(scene.movers)]
    (row,) = np.flatnonzero((scenes.number_table() == numbers).all(1))
    return row


@pytest.mark.parametrize(("size", "number"), [(64, 100), (96, 20)])
def test_drawn_videos_score_everything(size, number):
    videos = drawn(scenes.split()[2][:number], size)
    for video, scene in zip(videos, scenes.held_out(), strict=False):
        assert checker.score(video, scene) == (1,) * 6, (scene.caption, checker.observe(video))


def test_drawn_videos_under_the_noise_of_a_good_sampler_still_score_everything():
    held_out = scenes.split()[2][:30]
    videos = drawn(held_out) + np.random.RandomState(0).normal(0, 0.05, (30, FRAMES, 64, 64, 3))
    for video, scene in zip(videos, scenes.held_out(), strict=False):
        assert checker.score(video, scene) == (1,) * 6, (scene.caption, checker.observe(video))


def test_shuffled_captions_score_what_guessing_would():
    """An object has the asked colour in 1 or 2 of 8 videos; the rest is as likely again to be right."""
    shuffled = np.random.RandomState(0).permutation(100)
    scores = [
        checker.score(video, scene)
        for video, scene in zip(drawn(scenes.split()[2][shuffled]), scenes.held_out()[:100], strict=True)
    ]
    background, colour, shape, direction, speed, exact = np.mean(scores, axis=0)
    assert 0.05 < background < 0.25 and 0.1 < colour < 0.3
    assert shape < 0.1 and direction < 0.12 and 0.03 < speed < 0.2 and exact < 0.06


TRUTH = scenes.MovingScene((scenes.Mover("red", "star", "left", "slowly"),), "black")
WRONG = {
    "none": ({}, "black", (1, 1, 1, 1, 1, 1)),
    "background": ({}, "white", (0, 1, 1, 1, 1, 0)),
    "colour": ({"colour": "blue"}, "black", (1, 0, 0, 0, 0, 0)),
    "shape": ({"shape": "ring"}, "black", (1, 1, 0, 1, 1, 0)),
    "direction": ({"direction": "right"}, "black", (1, 1, 1, 0, 1, 0)),
    "axis": ({"direction": "up"}, "black", (1, 1, 1, 0, 1, 0)),
    "speed": ({"speed": "quickly"}, "black", (1, 1, 1, 1, 0, 0)),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_fault_costs_its_own_score(case):
    changed, background, want = WRONG[case]
    asked = scenes.MovingScene((TRUTH.movers[0]._replace(**changed),), background)
    assert checker.score(drawn([index_of(TRUTH)])[0], asked) == want


def test_what_stands_still_has_no_direction_and_what_is_not_asked_for_is_seen():
    video = drawn([index_of(TRUTH)])[0]
    (still,) = checker.observe(np.repeat(video[:1], FRAMES, axis=0)).movers
    assert still == ("red", "star", "", "")
    two = scenes.MovingScene((*TRUTH.movers, scenes.Mover("green", "ring", "right", "quickly")), "black")
    assert checker.score(drawn([index_of(two)])[0], TRUTH) == (1, 1, 1, 1, 1, 0)
    assert checker.score(video, two) == (1, 0.5, 0.5, 0.5, 0.5, 0)


def test_objects_stay_in_the_frame_and_never_meet():
    """Every object at every time and at the ends of what a seed decides."""
    numbers = scenes.number_table()[np.concatenate([scenes.split()[0][::7], scenes.split()[1][::997]])]
    time, radii = jnp.asarray([0.0, 1.0]), 1.15 * np.float32(scenes.RADII).sum(1)  # a star's tips
    two, reach = numbers[:, 9] == 2, radii[numbers[:, 9] - 1]
    for ends in np.indices((2, 2, 2)).reshape(3, -1).T * 2.0 - 1:
        moved = jnp.broadcast_to(jnp.asarray(ends, jnp.float32), (len(numbers), 3))
        places = [
            np.asarray(scenes.path(numbers[:, 1 + 4 * i : 5 + 4 * i], two, np.full(len(numbers), i), moved, time))
            for i in range(2)
        ]
        assert (np.abs(places[0] - 0.5).max((1, 2)) + reach < 0.5).all()
        assert (np.abs(places[1] - 0.5).max((1, 2)) + reach < 0.5)[two].all()
        vertical = (numbers[:, 3] > 1).astype(int)
        across = [place[np.arange(len(numbers)), :, 1 - vertical] for place in places]
        assert (np.abs(across[0] - across[1])[two] > 2 * radii[1]).all()


def test_a_seed_moves_what_the_caption_leaves_open():
    twice = np.repeat(scenes.split()[2][:1], 2)
    first, second = drawn(twice)
    assert np.abs(first - second).mean() > 0.01
    np.testing.assert_array_equal(drawn(twice), drawn(twice))


def test_sizes_and_numbers_of_frames_draw_one_scene():
    some = scenes.split()[2][:8]
    video, fine, short = drawn(some), drawn(some, 128), drawn(some, frames=9)
    halved = fine.reshape(8, FRAMES, 64, 2, 64, 2, 3).mean((3, 5))
    assert np.abs(video - halved).mean() < 0.005
    np.testing.assert_allclose(video[:, ::2], short, atol=1e-4)


def test_held_out_captions_are_200_and_never_trained_on():
    singles, pairs, held_out = scenes.split()
    assert len(set(held_out)) == 200 and not set(held_out) & (set(singles) | set(pairs))
    assert len(singles) + len(pairs) + 200 == len(scenes.number_table())
    table = scenes.number_table()
    captions = {scenes.moving_scene(row).caption for row in table[::50]} | {s.caption for s in scenes.held_out()}
    assert len(captions) == len(set(range(0, len(table), 50)) | set(held_out))
    assert {word for caption in captions for word in caption.split()} == set(scenes.words())
    assert [len(scene.movers) for scene in scenes.held_out()] == [1, 2] * 100
