"""How a joint sequence of text and visual tokens is laid out."""

from dataclasses import dataclass
from numbers import Integral

FULL = -1
"""Half-window sentinel: the head attends to every key."""

CACHED = -2
"""Half-window sentinel: the head's output is the cache's, nothing is computed."""


@dataclass(frozen=True)
class Layout:
    """A joint sequence: `num_text` text tokens before (`text_first`, FLUX) or after (SD3) `num_visual` visual tokens.

    Raises:
        ValueError: a count is negative or no integer, or there is no token at all.
    """

    num_text: int
    num_visual: int
    text_first: bool

    def __post_init__(self) -> None:
        if not isinstance(self.num_text, Integral) or not isinstance(self.num_visual, Integral):
            raise ValueError(f"{self.num_text=} and {self.num_visual=} must be integers.")
        if self.num_text < 0 or self.num_visual < 0 or self.length == 0:
            raise ValueError(f"{self.num_text=} and {self.num_visual=} must not be negative, nor both 0.")

    @property
    def length(self) -> int:
        return self.num_text + self.num_visual

    @property
    def text(self) -> slice:
        """Positions of the text tokens."""
        return slice(0, self.num_text) if self.text_first else slice(self.num_visual, self.length)

    @property
    def visual(self) -> slice:
        """Positions of the visual tokens."""
        return slice(self.num_text, self.length) if self.text_first else slice(0, self.num_visual)
