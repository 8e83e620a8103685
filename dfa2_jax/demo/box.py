"""Where the models in the box lie, and which words they know. Imports no JAX."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent

logger = logging.getLogger("dfa2_jax")


@dataclass(frozen=True)
class Boxed:
    """A trained model that is installed with the package.

    folder: of diffusers' layout. plan: a file. prompts: a file of some that are held out from training and calibration.
    tokenizer: the name of T5's in the folder. fingerprint: of the weights; a converted folder keeps it.
    """

    folder: Path
    plan: Path
    prompts: Path
    tokenizer: str
    fingerprint: str


IMAGES = Boxed(
    ROOT / "toy-sd35",
    ROOT / "plan.json",
    ROOT / "prompts.txt",
    "tokenizer_3",
    "512d45f7647e6122c7ff2865adb3a7dc62304213dddf31827db6114b728c76a3",
)
VIDEOS = Boxed(
    ROOT / "toy-cogvideox",
    ROOT / "video-plan.json",
    ROOT / "video-prompts.txt",
    "tokenizer",
    "2382ba44349ff0fd24e85872b669bf6db89e2f61d6c295741a3c75182a27aea1",
)


@cache
def known_words(boxed: Boxed) -> frozenset[str]:
    """The words of the training captions: T5's tokenizer has a piece for each."""
    tokenizer = json.loads((boxed.folder / boxed.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = (piece for piece, _ in tokenizer["model"]["vocab"])
    return frozenset(piece[1:] for piece in pieces if piece.startswith("▁") and piece != "▁")


def warn_unseen(fingerprint: str, prompts: Iterable[str | None]) -> None:
    """Says which words of the prompts a model in the box never saw; of another model, nothing."""
    for boxed in (IMAGES, VIDEOS):
        if fingerprint == boxed.fingerprint:
            words = dict.fromkeys(word for prompt in prompts for word in (prompt or "").split())
            if unseen := [word for word in words if word not in known_words(boxed)]:
                logger.warning(
                    "The model in the box never saw %s: what it draws there means nothing. It knows %s.",
                    ", ".join(map(repr, unseen)),
                    " ".join(sorted(known_words(boxed))),
                )
