"""What calibration tries for each head: its last output, and arrows of several widths, in several orders of tokens."""

import logging
from typing import Any

import numpy as np

from dfa2_jax.calibration.attends import saved_tiles
from dfa2_jax.options import CalibrationOptions
from dfa2_jax.plan.method import CACHED_METHOD, ORDERS, Method
from dfa2_jax.plan.setting import Setting

logger = logging.getLogger("dfa2_jax")


def candidates_of(options: CalibrationOptions, frames: int, shares_tokens: bool = False) -> tuple[Method, ...]:
    """The methods to try; arrows over time come after all in the native order.

    Args:
        frames: of the visual tokens; with one there is the native order alone.
        shares_tokens: devices share them, and cannot run arrows over time.

    Raises:
        ValueError: windows or orders are none, or leave nothing.
    """
    windows, orders = options.windows, options.orders
    check_windows(windows)
    there = ORDERS if frames > 1 and not shares_tokens else ORDERS[:1]
    orders = there if orders is None else tuple(orders)
    if not orders or {*orders} - {*there} or len({*orders}) < len(orders):
        whose = "devices that share tokens" if shares_tokens else f"tokens of {frames} frames"
        raise ValueError(f"{orders=} must be different ones of {there}, which {whose} have.")
    candidates = (
        *([CACHED_METHOD] if options.cache else []),
        *(Method.arrow(f, order) for order in ORDERS if order in orders for f in windows),
    )
    if not candidates:
        raise ValueError(f"{windows=} and cache={options.cache} leave nothing to choose from.")
    return candidates


def check_windows(windows: tuple[int, ...]) -> None:
    """Raises ValueError where they are no arrows."""
    if any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in windows) or len({*windows}) < len(windows):
        raise ValueError(f"{windows=} must be different positive integers: 8 is an arrow of 1/8 of the visual tokens.")


def warn_idle(candidates: tuple[Method, ...], setting: Setting, tiles: tuple[int, int]) -> None:
    """Small images: where a tile holds more than a band, arrows save nothing."""
    saved = []
    for layer in setting.layers:
        windows = np.array([method.half_window(layer.num_visual) for method in candidates], np.int32)
        saved.append(saved_tiles(windows, layer.layout, tiles))
    if idle := [str(method) for method, *savings in zip(candidates, *saved, strict=True) if not any(savings)]:
        logger.warning(
            "%s save no tile of %s queries x %s keys in any layer (%s visual tokens) and are never chosen: "
            "give smaller tiles",
            ", ".join(idle), *tiles, setting.layers[0].num_visual,
        )  # fmt: skip


def check_tiles(tiles: Any) -> None:
    """Raises ValueError where they are no tiles."""
    if not isinstance(tiles, tuple) or len(tiles) != 2 or any(type(size) is not int or size < 1 for size in tiles):
        raise ValueError(f"{tiles=} must be two positive integers: queries and keys of a tile.")
