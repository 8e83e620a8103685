"""What a head does at a step, by name and by the letter that a plan's file has for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from dfa2_jax.io.errors import printable
from pallas_kernels.layout import CACHED, FULL

NATIVE, TIME = "native", "time"
"""Orders of visual tokens: frame, row, column; and row, column, frame."""

ORDERS = NATIVE, TIME


class PlanError(ValueError):
    """A plan cannot be read, or does not fit. The message names the field, both values and the way out."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass(frozen=True)
class Method:
    """What a head does: "full", "cached" (its output of the step before), "arrow(1/f)", or "arrow(1/f, time)".

    An arrow's band runs over the visual tokens in their native order, frame by frame, or place by place over time.

    Raises:
        PlanError: there is no method of that name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in ("full", "cached") and not self._fraction:
            nearest = get_close_matches(self.name[:100], ("full", "cached"), 1)
            advice = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise PlanError(
                f"{self.name!r:.100} is not a method: full, cached, arrow(1/f) or arrow(1/f, time) with f from 1 "
                f"to 99999.{advice}"
            )

    @classmethod
    def arrow(cls, fraction: int, order: str = NATIVE) -> "Method":
        """A band as wide as 1/fraction of the visual tokens, half of it on each side.

        Args:
            order: of the tokens: "native" or "time".
        """
        return cls(f"arrow(1/{fraction})" if order == NATIVE else f"arrow(1/{fraction}, {order})")

    @property
    def order(self) -> str:
        """In which its band runs; of what has no band, "native"."""
        return TIME if self.name.endswith(f", {TIME})") else NATIVE

    @property
    def _fraction(self) -> int:
        number = self.name.removeprefix("arrow(1/").removesuffix(")").removesuffix(f", {TIME}")
        is_written = self.name in (f"arrow(1/{number})", f"arrow(1/{number}, {TIME})")
        exact = is_written and number.isascii() and number.isdecimal() and len(number) < 6
        return int(number) if exact and not number.startswith("0") else 0

    def half_window(self, num_visual: int) -> int:
        """Visual tokens kept on each side of the diagonal; `FULL` or `CACHED`."""
        if not self._fraction:
            return FULL if self.name == "full" else CACHED
        return max(1, num_visual // (2 * self._fraction))

    def __str__(self) -> str:
        return self.name


FULL_METHOD, CACHED_METHOD = Method("full"), Method("cached")

ARROW_LETTERS = "abdeghijklmnopqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def letters(methods: Sequence[Method]) -> list[str]:
    """One for each method: f is full, c is cached, and arrows are a, b, d, ... in their order.

    Raises:
        PlanError: there are more arrows than letters.
    """
    fixed = {"full": "f", "cached": "c"}
    if (count := sum(method.name not in fixed for method in methods)) > len(ARROW_LETTERS):
        raise PlanError(f"methods: there are {count} arrows, but letters for {len(ARROW_LETTERS)}: take fewer.")
    arrows = iter(ARROW_LETTERS)
    return [fixed.get(method.name) or next(arrows) for method in methods]


def check_methods(methods: Sequence[Method], token_frames: int) -> None:
    """
    Raises:
        PlanError: there are more arrows than letters, or a band runs over time where tokens are of one frame.
    """
    letters(methods)
    over_time = [str(method) for method in methods if method.order == TIME]
    if over_time and token_frames == 1:
        raise PlanError(f"methods: {', '.join(over_time)} run over time, and the visual tokens are of one frame.")
