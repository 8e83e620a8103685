"""Where the model in the box lies, and which words it knows. Imports no JAX."""

import json
import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "toy-sd35"
PLAN = FOLDER.with_name("plan.json")
PROMPTS = FOLDER.with_name("prompts.txt")
"""Held out from training and from the plan's calibration."""

FINGERPRINT = "512d45f7647e6122c7ff2865adb3a7dc62304213dddf31827db6114b728c76a3"
"""The fingerprint of the model's weights. A converted folder keeps it."""

logger = logging.getLogger("dfa2_jax")


@cache
def known_words() -> frozenset[str]:
    """The words of the training captions: T5's tokenizer has a piece for each."""
    vocabulary = json.loads((FOLDER / "tokenizer_3" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return frozenset(piece[1:] for piece, _ in vocabulary if piece.startswith("▁") and piece != "▁")


def warn_unseen(fingerprint: str, prompts: Iterable[str | None]) -> None:
    """Says which words of the prompts the model in the box never saw; of another model, nothing."""
    if fingerprint != FINGERPRINT:
        return
    words = dict.fromkeys(word for prompt in prompts for word in (prompt or "").split())
    if unseen := [word for word in words if word not in known_words()]:
        logger.warning(
            "The model in the box never saw %s: what it draws there means nothing. It knows %s.",
            ", ".join(map(repr, unseen)),
            " ".join(sorted(known_words())),
        )
