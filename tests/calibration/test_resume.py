"""A file of progress gives back what was put in, or is refused with the way out."""

import json

import numpy as np
import pytest
from mutations import sample_plan

from dfa2_jax.calibration.resume import Checkpointed
from dfa2_jax.io.digest import digest_of
from dfa2_jax.plan.plan import Plan

EMPTY = Plan(sample_plan(0).setting, sample_plan(0).methods, np.zeros((3, 3, 4), np.uint8))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "plan.json.progress"
    picks = np.arange(12).reshape(3, 4) % 4 - 1
    Checkpointed.read(path, "sha256:this", EMPTY).add(picks, np.full((3, 4, 3), 0.25, np.float32))
    return path


def read(path, digest="sha256:this"):
    return Checkpointed.read(path, digest, EMPTY)


def test_progress_is_read_as_it_was_written(path):
    again = read(path)
    assert again.picks == [[[-1, 0, 1, 2]] * 3] and again.spent == [(0.75,) * 3] and again.steps == 1
    assert again.filled(EMPTY).choices[1].tolist() == [[0, 1, 2, 3]] * 3
    assert [file.name for file in path.parent.iterdir()] == [path.name]


CHANGES = {
    "other picks": lambda content: content["picks"][0][0].__setitem__(0, 0),
    "other errors": lambda content: content["spent"][0].__setitem__(0, 0.5),
    "an unknown field": lambda content: content.update(note=1),
    "a missing field": lambda content: content.pop("spent"),
    "no digest": lambda content: content.pop("digest"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_progress_is_refused(case, path):
    content = json.loads(path.read_text())
    CHANGES[case](content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="progress, remove it to start anew: digest is .*, the content's is .*changed"):
        read(path)


@pytest.mark.parametrize(
    "change",
    [
        *({"picks": [[[5]]]}, {"spent": []}, {"picks": None}, {"picks": [[[3] * 4] * 3]}, {"spent": [["x"] * 3]}),
        *({"picks": [[[pick] * 4] * 3]} for pick in (1.5, "1", True)),  # NumPy would make 1 of each
    ],
    ids=str,
)
def test_progress_of_another_shape_is_refused_even_signed(change, path):
    content = json.loads(path.read_text()) | change
    del content["digest"]
    path.write_text(json.dumps(content | {"digest": digest_of(content)}))
    with pytest.raises(ValueError, match="progress, remove it to start anew: "):
        read(path)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [(0, "is empty"), (10, "is not valid JSON"), (-1, "is not valid JSON")],
    ids=["empty", "truncated", "a byte short"],
)
def test_truncated_progress_says_to_remove_it(kept, reason, path):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"progress, remove it to start anew: .*progress {reason}"):
        read(path)


def test_progress_of_another_calibration_is_refused(path):
    with pytest.raises(ValueError, match="remove it .* of another calibration, 'sha256:this', not of 'sha256:that'"):
        read(path, "sha256:that")
