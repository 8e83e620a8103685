"""Attention that tries every method on every head, and keeps what it chose."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dfa2_jax.calibration.search import choose
from dfa2_jax.nn.attention import Heads, LayerPlan, Project, arrow_attention, nested_arrow_attention
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.orders import to_native, to_orders, transposed
from dfa2_jax.plan.method import ORDERS, Method
from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import count_tiles, seen_keys


@carrier
class Trials:
    """What calibration remembers of a stack of layers."""

    caches: Float[Array, "L B T N H"]
    picks: Int[Array, "L N"]
    """Number of the chosen candidate; -1: full."""
    errors: Float[Array, "L N M"]
    """Relative squared error of every candidate."""

    @classmethod
    def of_caches(cls, caches: Float[Array, "L B T N H"], num_candidates: int) -> "Trials":
        size = len(caches), caches.shape[3]
        return cls(caches, jnp.zeros(size, jnp.int32), jnp.zeros((*size, num_candidates)))


@carrier
class Budget:
    """What the errors of one layer may be at one step. It is data: another budget compiles nothing."""

    delta: Float[Array, ""]
    """What the errors of the chosen methods may add up to over the heads."""
    bound: Float[Array, ""]
    """What each stays below."""

    @classmethod
    def of(cls, delta: float, c: float | None, heads: int) -> "Budget":
        """`c * delta / heads` bounds a head (appendix); None: nothing does. Rounded down: float32(0.6) is above 0.6."""
        return cls(float32_below(delta), float32_below(np.inf if c is None else c * delta / heads))


def float32_below(x: float) -> Float[Array, ""]:
    """The largest float32 that is not above x."""
    nearest = np.float32(x)
    return jnp.asarray(np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > x else nearest)


@carrier
class Moments:
    """Means over a part of the batch, per head, in float32; with a leading axis, of several equal parts."""

    squares: Float[Array, "*parts N M"]
    """Means of the squared differences between each candidate's output and the dense one."""
    mean: Float[Array, "*parts N"]
    """The dense output's mean."""
    spread: Float[Array, "*parts N"]
    """The mean of the dense output's squared distances from that mean."""
    tokens: Float[Array, "*parts"] | None = None
    """How many there are, where text is padded; None: parts have as many."""


Tokens = tuple[Heads, Heads, Heads, Int[Array, " B"] | None]
"""Queries, keys and values, and how long text is (`LayerPlan.text_length`)."""


@dataclass(frozen=True)
class TryEverything:
    """Attention that finds out what each head could do with.

    candidates: methods other than full.
    tiles: queries and keys of the tiles that a method saves, `Plan.density`'s.
    chunk: samples of the batch whose candidates are held at once; None: all.
    shared_by: the axis of a mesh whose devices share the batch, each with as many samples of it; None: there is none.
    frames: of the visual tokens, over which candidates may run in time.
    """

    candidates: tuple[Method, ...]
    budget: Budget
    tiles: tuple[int, int]
    chunk: int | None = None
    implementation: str | None = None
    shared_by: str | None = None
    frames: int = 1

    @property
    def orders(self) -> Int[np.ndarray, " M"]:
        """A number of `ORDERS` for each candidate."""
        return np.array([ORDERS.index(method.order) for method in self.candidates], np.int32)

    def memory(self, stack: jax.ShapeDtypeStruct) -> Trials:
        return Trials.of_caches(jnp.zeros(stack.shape, stack.dtype), len(self.candidates))

    def __call__(self, project: Project, layout: Layout, memory: Trials, plan: LayerPlan) -> tuple[Heads, Trials]:
        q, k, v = project()
        windows = np.array([method.half_window(layout.num_visual) for method in self.candidates], np.int32)
        saved = saved_tiles(windows, layout, self.tiles)
        strategy = self._select if self.chunk is None else self._recompute
        tokens = q, k, v, plan.text_length
        caches, picks, errors = strategy(windows, saved, layout, tokens, memory.caches, plan.place)
        picked = memory.picks.at[plan.place].set(picks), memory.errors.at[plan.place].set(errors)
        return caches[plan.place], Trials(caches, *picked)

    def _select(
        self, windows: Int[np.ndarray, " M"], saved: tuple[int, ...], layout: Layout,
        tokens: Tokens, caches: Float[Array, "L B T N H"], place: Int[Array, ""],
    ) -> tuple[Float[Array, "L B T N H"], Int[Array, " N"], Float[Array, "N M"]]:  # fmt: skip
        """Hold every candidate's output, and take the chosen ones."""
        candidates, out, seen = self._outputs(windows, layout, *tokens, caches[place])
        errors = self._errors(jax.tree.map(lambda x: x[None], moments(candidates, out, seen)))
        picks = choose(errors, saved, self.budget.delta, self.budget.bound)
        for number, candidate in enumerate(candidates):
            out = jnp.where((picks == number)[None, None, :, None], candidate, out)
        return jax.lax.dynamic_update_index_in_dim(caches, out, place, 0), picks, errors

    def _recompute(
        self, windows: Int[np.ndarray, " M"], saved: tuple[int, ...], layout: Layout,
        tokens: Tokens, caches: Float[Array, "L B T N H"], place: Int[Array, ""],
    ) -> tuple[Float[Array, "L B T N H"], Int[Array, " N"], Float[Array, "N M"]]:  # fmt: skip
        """Drop each chunk's candidates after their errors, and compute the chosen ones again."""
        q, k, v, text_length = tokens
        chunk = gcd(len(q), self.chunk or 1)
        parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (*tokens, caches[place]))
        errors = self._errors(jax.lax.map(lambda part: moments(*self._outputs(windows, layout, *part)), parts))
        picks = choose(errors, saved, self.budget.delta, self.budget.bound)
        half_window = jnp.append(jnp.asarray(windows), jnp.int32(FULL))[picks]
        options = {"layout": layout, "text_length": text_length, "implementation": self.implementation}
        if not self.orders.any():
            return arrow_attention(q, k, v, half_window, cache=caches, layer=place, **options), picks, errors
        order = jnp.append(jnp.asarray(self.orders), 0)[picks]
        q, k, v = (to_orders(x, order, layout, self.frames) for x in (q, k, v))
        caches = arrow_attention(q, k, v, half_window, cache=caches, layer=place, **options)
        native = to_native(caches[place], order, layout, self.frames)  # what was reused lay so
        return jax.lax.dynamic_update_index_in_dim(caches, native, place, 0), picks, errors

    def _errors(self, parts: Moments) -> Float[Array, "N M"]:
        """Errors of the whole batch, from equal parts of this device's samples."""
        if self.shared_by is not None:
            parts = jax.tree.map(lambda x: jax.lax.all_gather(x, self.shared_by, tiled=True), parts)
        return relative_errors(parts)

    def _outputs(
        self,
        windows: Int[np.ndarray, " M"],
        layout: Layout,
        q: Heads,
        k: Heads,
        v: Heads,
        text_length: Int[Array, " B"] | None,
        previous: Heads,
    ) -> tuple[list[Heads], Heads, Bool[Array, "B T"] | None]:
        """Every head under every candidate, and dense, all in the native order; and which tokens are no padding."""
        options = {"layout": layout, "text_length": text_length, "implementation": self.implementation}
        outputs: dict[Any, Heads] = {(0, CACHED): previous}
        dense = None
        for order in np.unique(self.orders[windows >= 0]):
            arrows = np.unique(windows[(windows >= 0) & (self.orders == order)])
            of_order = (transposed(x, layout, self.frames) if order else x for x in (q, k, v))
            made: Any = nested_arrow_attention(*of_order, half_windows=jnp.asarray(arrows), **options)
            if order:
                made = [transposed(x, layout, layout.num_visual // self.frames) for x in made]
            outputs |= {(order, window): made[place] for place, window in enumerate(arrows)}
            dense = made[-1] if dense is None else dense
        if dense is None:
            dense = arrow_attention(q, k, v, jnp.full(q.shape[2], FULL, jnp.int32), **options)
        seen = None if text_length is None else seen_keys(text_length, layout)
        return [outputs[key] for key in zip(self.orders, windows, strict=True)], dense, seen


def saved_tiles(windows: Int[np.ndarray, " M"], layout: Layout, tiles: tuple[int, int]) -> tuple[int, ...]:
    """Tiles of a head that each candidate does not visit."""
    count = count_tiles(windows, layout, *tiles)
    return tuple(int(count.total - visited) for visited in count.visited)


def moments(candidates: list[Heads], dense: Heads, seen: Bool[Array, "B T"] | None = None) -> Moments:
    """Over batch, tokens (those of text too, as in the paper) and channels.

    Args:
        seen: tokens that are no padding; None: all.
    """
    axes, exact = (0, 1, 3), dense.astype(jnp.float32)
    count = None if seen is None else seen.sum(dtype=jnp.float32)
    where = None if seen is None else seen[:, :, None, None]
    mean = exact.mean(axes, keepdims=True, where=where)
    squares = [jnp.square(candidate.astype(jnp.float32) - exact).mean(axes, where=where) for candidate in candidates]
    spread = jnp.square(exact - mean).mean(axes, where=where)
    return Moments(jnp.stack(squares, axis=1), mean[0, 0, :, 0], spread, count)


def relative_errors(parts: Moments) -> Float[Array, "N M"]:
    """Relative squared error of each head under each candidate, from parts of the batch on the first axis.

    `mean((o' - o)^2) / mean((o - mean(o))^2)` (section 3.2). The mean of the parts' errors would be another number.
    """

    def average(x: Float[Array, "parts ..."]) -> Float[Array, "..."]:
        if parts.tokens is None:
            return x.mean(0)
        return jnp.tensordot(parts.tokens / parts.tokens.sum(), x, axes=1, precision="highest")

    squares, mean, spread = (average(x) for x in (parts.squares, parts.mean, parts.spread))
    return squares / (spread + average(jnp.square(parts.mean - mean[None])))[:, None]
