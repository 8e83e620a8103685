"""Figures of what files say: text is no markup, and no window system is asked for."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dfa2_jax.io.extras import need


@contextmanager
def new_figure(width: float, height: float, feature: str) -> Iterator[Any]:
    """An empty figure of so many inches, to be drawn and saved within.

    Raises:
        MissingExtra: matplotlib, which `feature` needs, is not installed.
    """
    matplotlib = import_matplotlib(feature, "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Names in a plan are anyone's: "$" would begin mathtext, and TeX would run programs.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def import_matplotlib(feature: str, extra: str) -> Any:
    """matplotlib, whatever backend the environment asks for: a notebook's may be missing here.

    Raises:
        MissingExtra: it is not installed.
    """
    if loaded := sys.modules.get("matplotlib"):
        return loaded
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        matplotlib = need("matplotlib", feature, extra)
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with suppress(ValueError):  # it is not installed
            matplotlib.rcParams["backend"] = backend
    return matplotlib
