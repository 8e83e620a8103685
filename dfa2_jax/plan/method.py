"""What a head does at a step, by name and by the letter that a plan's file has for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from dfa2_jax.io.errors import printable
from pallas_kernels.layout import CACHED, FULL


class PlanError(ValueError):
    """A plan cannot be read, or does not fit. The message names the field, both values and the way out."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass(frozen=True)
class Method:
    """What a head does: "full", "cached" (its output of the step before), or "arrow(1/f)".

    Raises:
        PlanError: there is no method of that name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in ("full", "cached") and not self._fraction:
            nearest = get_close_matches(self.name[:100], ("full", "cached"), 1)
            advice = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise PlanError(
                f"{self.name!r:.100} is not a method: full, cached, or arrow(1/f) with f from 1 to 99999.{advice}"
            )

    @classmethod
    def arrow(cls, fraction: int) -> "Method":
        """A band as wide as 1/fraction of the visual tokens, half of it on each side."""
        return cls(f"arrow(1/{fraction})")

    @property
    def _fraction(self) -> int:
        number = self.name.removeprefix("arrow(1/").removesuffix(")")
        exact = self.name == f"arrow(1/{number})" and number.isascii() and number.isdecimal() and len(number) < 6
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
