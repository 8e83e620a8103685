"""Bounds on what the files of a tokenizer may ask of the Rust library that runs them: length and time."""

import base64
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Answer = TypeVar("Answer")

MAX_GROWTH = 10_000
"""Times that steps of a tokenizer may lengthen a text. SentencePiece's charsmap has replacements of up to 33 bytes."""

MAX_SECONDS = 60.0
"""For the prompts of a call. CLIP and T5 take a millisecond a prompt."""

STEPS = ("normalizers", "pretokenizers", "decoders")
FACTORS = {"ByteLevel": 2, "BertNormalizer": 3}


def check_growth(step: Any, name: str) -> int:
    """At most how many times a step of tokenizer.json, or a sequence of steps, lengthens a text.

    Args:
        name: of the step, for the error.

    Raises:
        ValueError: more than `MAX_GROWTH` times.
    """
    if not isinstance(step, dict):
        return 1
    growth = 1
    for nested in (nested for steps in STEPS for nested in step.get(steps) or []):
        growth *= check_growth(nested, name)
        check_limit(growth, name)
    growth *= FACTORS.get(str(step.get("type")), 1)
    growth *= 1 + max(len(step.get(field) or "") for field in ("content", "prepend"))
    if charsmap := step.get("precompiled_charsmap"):
        growth *= check_charsmap(base64.b64decode(charsmap), name)
    check_limit(growth, name)
    return growth


def check_limit(growth: int, name: str) -> None:
    if growth > MAX_GROWTH:
        raise ValueError(f"{name} may lengthen a text {growth:.3g} times, more than {MAX_GROWTH}: get the file again")


def check_charsmap(charsmap: bytes, name: str) -> int:
    """At most how many times a charsmap of SentencePiece lengthens a text: the bytes of its longest replacement.

    A charsmap is the size of a trie, the trie, and replacements that end in a zero byte.

    Raises:
        ValueError: more than `MAX_GROWTH` times, or the trie is larger than the charsmap: the library would reserve
            memory for it, twice its size.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if size > max(len(charsmap) - 4, 0):
        raise ValueError(f"{name} has a charsmap of {len(charsmap)} bytes with a trie of {size}: get the file again")
    growth = max(1, *map(len, charsmap[4 + size :].split(b"\0")), 0)
    check_limit(growth, name)
    return growth


def within_time(work: Callable[[], Answer]) -> Answer:
    """The answer of Rust code that no signal stops.

    Raises:
        TimeoutError: no answer within `MAX_SECONDS`; the work goes on in its thread until the process ends.
        Exception: as `work` raises.
    """
    answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:  # a panic is no Exception
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=MAX_SECONDS)
    except Empty:
        raise TimeoutError(f"no answer after {MAX_SECONDS:g} seconds: get the tokenizer's files again") from None
    if error is not None:
        raise error
    return answer
