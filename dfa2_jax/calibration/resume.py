"""The findings of a calibration so far, in a file, so that an interrupted one goes on."""

import json
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dfa2_jax.io.atomic import replacing
from dfa2_jax.io.digest import digest_of
from dfa2_jax.io.errors import CheckpointError, blame, read_json
from dfa2_jax.plan.plan import Plan

FIELDS = ("calibration", "picks", "spent")
"""What a file holds beside the digest of them all: the digest of what the findings depend on, and the findings."""


@dataclass
class Checkpointed:
    """Findings by step from the second on; in a file if they have one, written after each step."""

    path: Path | None
    digest: str
    """The digest of all that the findings depend on."""
    picks: list[list[list[int]]]
    """By step, layer and head: numbers of candidates, -1 for full."""
    spent: list[tuple[float, ...]]
    """By step and layer: the chosen methods' errors, added up over the heads."""

    @classmethod
    def read(cls, path: str | PathLike[str] | None, digest: str, empty: Plan) -> "Checkpointed":
        """The findings in `path`, or none yet.

        Args:
            empty: the plan that is to be filled: the first of its methods is full, the others the candidates.

        Raises:
            ValueError: the file is of another calibration, or damaged.
        """
        path = None if path is None else Path(path)
        if path is None or not path.exists():
            return cls(path, digest, [], [])
        with blame(f"{path}, remove it to start anew"):
            try:
                content = read_json(path)
            except CheckpointError as error:
                raise ValueError(str(error)) from error
            own = digest_of({name: content.get(name) for name in FIELDS})
            if {*content} != {*FIELDS, "digest"} or content["digest"] != own:
                raise ValueError(f"digest is {content.get('digest')!r:.100}, the content's is {own!r}: it was changed")
            if content["calibration"] != digest:
                raise ValueError(
                    f"it is the progress of another calibration, {content['calibration']!r:.100}, not of "
                    f"{digest!r}; or give another file"
                )
            picks, spent = _array(content, "picks", int), _array(content, "spent", int, float)
            steps, *size = empty.choices.shape
            if not 1 <= len(picks) < steps or [*picks.shape[1:]] != size or spent.shape != picks.shape[:2]:
                raise ValueError(
                    f"picks {picks.shape} and spent {spent.shape} must be of 1 to {steps - 1} steps, and of layers and "
                    f"heads {size}"
                )
            if picks.min() < -1 or picks.max() >= len(empty.methods) - 1 or not np.isfinite(spent).all():
                raise ValueError(f"picks are {picks.min()} to {picks.max()}, for {len(empty.methods) - 1} candidates")
            return cls(path, digest, picks.tolist(), [tuple(layers) for layers in spent.tolist()])

    @property
    def steps(self) -> int:
        return len(self.picks)

    def add(self, picks: Int[np.ndarray, "layers N"], errors: Float[np.ndarray, "layers N M"]) -> None:
        chosen = np.take_along_axis(errors, np.maximum(picks, 0)[..., None], -1)[..., 0].astype(np.float64)
        self.picks.append(picks.tolist())
        self.spent.append(tuple(np.where(picks < 0, 0, chosen).sum(1).tolist()))
        if self.path is not None:
            content = dict(zip(FIELDS, (self.digest, self.picks, self.spent), strict=True))
            with replacing(self.path) as file:
                file.write(json.dumps(content | {"digest": digest_of(content)}).encode())

    def filled(self, empty: Plan) -> Plan:
        """With what is found; later steps stay as they are."""
        choices = empty.choices.copy()
        if self.picks:
            choices[1 : 1 + self.steps] = np.array(self.picks) + 1  # the table's first method is full
        return replace(empty, choices=choices)


def _array(content: dict[str, Any], field: str, *kinds: type) -> np.ndarray:
    """A field's nested lists, of numbers of these kinds alone: NumPy would make 1 of 1.5, of "1" and of true."""
    values = [content[field]]
    while any(isinstance(value, list) for value in values):
        values = [value for nested in values for value in (nested if isinstance(nested, list) else [nested])]
    if wrong := [value for value in values if type(value) not in kinds]:
        raise ValueError(
            f"{field} holds {wrong[0]!r:.100}, which is not {' or '.join(kind.__name__ for kind in kinds)}"
        )
    return np.asarray(content[field], kinds[-1])
