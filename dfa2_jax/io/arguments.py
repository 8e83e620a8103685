"""A parser of command lines that names the nearest flag or command for a misspelt one. Imports no JAX."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations.

    The command that lacks a flag refuses the flag, with the command's own usage. A misspelt command gets the usage of
    the nearest command.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = [*(sys.argv[1:] if args is None else args)]
        own = words if self._subparsers is None else [*takewhile(lambda word: word.startswith("-"), words)]
        if wrong := self._misspelt(own):  # what follows a command is the command's
            self._refuse(wrong)  # before what is missing: a misspelt flag may be the missing one
        parsed, unknown = super().parse_known_args(words, namespace)
        return self._refuse(unknown) if unknown else (parsed, unknown)

    def _misspelt(self, words: Sequence[str]) -> list[str]:
        """Words that argparse takes for flags, and that are none of this command."""
        options = words[: words.index("--")] if "--" in words else words
        flags = [word for word in options if word.startswith("--") and " " not in word]
        return [word for word in flags if word.partition("=")[0] not in self._option_string_actions]

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        advice = []
        for word in unknown:
            flag = word.partition("=")[0]
            nearest = self._nearest(flag.replace("_", "-")) if flag.startswith("-") else []
            advice.append(f"{flag} (did you mean {' or '.join(nearest)}?)" if nearest else word)
        self.error(f"unrecognized arguments: {' '.join(advice)}")

    def _nearest(self, flag: str) -> list[str]:
        """The flags that a flag abbreviates, else the nearest one."""
        abbreviated = [name for name in self._option_string_actions if len(flag) > 2 and name.startswith(flag)]
        return abbreviated[:3] or get_close_matches(flag, self._option_string_actions, 1)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            nearest = get_close_matches(value, action.choices, 1)
            (action.choices[nearest[0]] if nearest else self).print_usage(sys.stderr)
            advice = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(action.choices)}"
            self.exit(2, f"{self.prog}: error: no command {value!r}: {advice}\n")
        super()._check_value(action, value)
