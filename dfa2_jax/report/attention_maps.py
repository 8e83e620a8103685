"""What heads look at in dense sampling, next to what a plan gives them: attention on text, and near the diagonal."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import trange

from dfa2_jax.io.errors import printable
from dfa2_jax.nn.attention import Heads, LayerPlan, Project, arrow_attention, in_order
from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.timing import told
from dfa2_jax.plan.canvas import new_figure
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.view import ranked
from pallas_kernels.layout import Layout
from pallas_kernels.mask import seen_keys

WEIGHT_BYTES = 2**26
"""Float32 weights held at once, of a chunk of one head's queries. FLUX at 2048 px has 27 GB of them in a layer."""


@dataclass(frozen=True)
class Masses:
    """Where the visual queries' attention goes, on average over them and the images.

    text: [steps, layers, heads], on text keys; 0 where a layer sees no text.
    near: [windows, steps, layers, heads], on visual keys within each half-window; the rest is on visual keys beyond.
    half_windows: tokens on each side of the diagonal, increasing.
    """

    text: Float[np.ndarray, "steps layers N"]
    near: Float[np.ndarray, "windows steps layers N"]
    half_windows: tuple[int, ...]

    @property
    def locality(self) -> Float[np.ndarray, "steps layers N"]:
        """The share within the widest window of what visual keys get."""
        return self.near[-1] / np.maximum(1 - self.text, 1e-6)


def masses(
    q: Heads,
    k: Heads,
    half_windows: tuple[int, ...],
    layout: Layout,
    text_length: Int[Array, " B"] | None = None,
) -> Float[Array, "N masses"]:
    """Per head, over batch and visual queries: the mean weight on text keys, then on visual keys in each half-window.

    One head and one chunk of its queries at a time: the weights never exist as a whole.
    """
    batch, visual = q.shape[0], layout.num_visual
    rows = min(visual, max(1, WEIGHT_BYTES // (4 * batch * layout.length)))
    chunks = -(-visual // rows)
    places = jnp.arange(chunks * rows).reshape(chunks, rows)
    keys = jnp.arange(visual)
    seen = None if text_length is None else seen_keys(text_length, layout)[:, None]

    def of_head(qk: tuple[Array, Array]) -> Float[Array, " masses"]:
        queries, keys_of_head = (x.astype(jnp.float32) for x in qk)  # [B, V, H] and [B, S, H]
        padded = jnp.pad(queries, ((0, 0), (0, chunks * rows - visual), (0, 0)))

        def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
            part, positions = chunk
            scores = jnp.einsum("BTH,BSH->BTS", part, keys_of_head, precision="highest") * part.shape[-1] ** -0.5
            weights = jax.nn.softmax(scores if seen is None else jnp.where(seen, scores, -jnp.inf), axis=-1)
            distance = jnp.abs(positions[:, None] - keys[None, :])
            on_visual = weights[:, :, layout.visual]
            kept = [weights[:, :, layout.text].sum(-1)]
            kept += [jnp.where((distance <= window)[None], on_visual, 0).sum(-1) for window in half_windows]
            return total + jnp.where((positions < visual)[None, None], jnp.stack(kept), 0).sum((1, 2)), None

        parts = jnp.moveaxis(padded.reshape(batch, chunks, rows, -1), 1, 0)
        total, _ = jax.lax.scan(add, jnp.zeros(1 + len(half_windows)), (parts, places))
        return total / (batch * visual)

    return jax.lax.map(of_head, tuple(jnp.moveaxis(x, 2, 0) for x in (q[:, layout.visual], k)))


@dataclass(frozen=True)
class Watching:
    """Dense attention that remembers every layer's `masses`."""

    half_windows: tuple[int, ...]
    implementation: str | None = None

    def memory(self, stack: jax.ShapeDtypeStruct) -> Float[Array, "L N masses"]:
        return jnp.zeros((stack.shape[0], stack.shape[3], 1 + len(self.half_windows)))

    def __call__(
        self, project: Project, layout: Layout, memory: Float[Array, "L N masses"], plan: LayerPlan
    ) -> tuple[Heads, Float[Array, "L N masses"]]:
        q, k, v = project()
        options = {"layout": layout, "text_length": plan.text_length, "implementation": self.implementation}
        of_heads = masses(q, k, self.half_windows, layout, plan.text_length)
        return arrow_attention(q, k, v, **options), memory.at[plan.place].set(of_heads)


def watch(call: Call, half_windows: Sequence[int], *, progress: bool = True) -> Masses:
    """Sample densely, and see where attention goes.

    Args:
        call: one prompt or a few: the masses are their average.
        half_windows: visual tokens on each side of the diagonal, increasing.
    """
    watched = replace(call, options=replace(call.options, plan=None, attend=Watching(tuple(half_windows))))
    run, state = watched.program()
    with told("compiling", progress):
        state = jax.block_until_ready(run(state, 0, 0))
    by_step = []
    for i in trange(call.request.steps, desc="heads", disable=not progress):
        state = run(state, i, i + 1)
        by_step.append(in_order(call.layers, state.memory))
    text, *near = np.moveaxis(np.stack(by_step), -1, 0)
    return Masses(text, np.stack(near), tuple(half_windows))


def windows_of(plans: Sequence[Plan]) -> tuple[int, ...]:
    """Half-windows of every arrow that these plans of one setting know; an eighth of the visual tokens if none."""
    visual = plans[0].setting.layers[0].num_visual
    known = {method.half_window(visual) for plan in plans for method in plan.methods}
    return tuple(sorted(window for window in known if window >= 0)) or (max(1, visual // 16),)


def draw(plan: Plan, masses: Masses) -> bytes:
    """A PNG, layers from top to bottom, heads within, nodes from left to right: locality, text, method."""
    nodes = list(plan.nodes)
    masses = Masses(masses.text[nodes], masses.near[:, nodes], masses.half_windows)
    steps, layers, heads = plan.choices.shape
    tall = layers * min(max(0.35, 0.06 * heads), 0.8)
    with new_figure(4.5 + 3 * min(0.12 * steps, 3), tall + 1.8, "The picture of heads") as figure:
        _fill(figure, plan, masses, tall)
        figure.savefig(file := io.BytesIO(), format="png", dpi=110)
    return file.getvalue()


def _fill(figure: Any, plan: Plan, masses: Masses, tall: float) -> None:
    """
    Args:
        tall: inches of the three pictures.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    steps, layers, heads = plan.choices.shape
    ranks, names, colours = ranked(plan)
    (local_scale, text_scale, legend), (local, text, method) = figure.subplots(2, 3, height_ratios=(0.15, tall))

    def show(axes: Any, values: np.ndarray, title: str, **options: Any) -> Any:
        picture = values.transpose(1, 2, 0).reshape(layers * heads, steps)
        extent = (-0.5, steps - 0.5, layers - 0.5, -0.5)
        shown = axes.imshow(picture, aspect="auto", interpolation="nearest", extent=extent, **options)
        for layer in range(layers - 1):
            axes.axhline(layer + 0.5, color="silver", linewidth=1.5)
        axes.set_yticks([])
        axes.set_xlabel("step", fontsize=8)
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=7)
        return shown

    scale = {"vmin": 0, "vmax": 1, "cmap": "magma"}
    near = show(local, masses.locality, f"locality: within {masses.half_windows[-1]} tokens", **scale)
    figure.colorbar(near, cax=local_scale, orientation="horizontal").ax.tick_params(labelsize=7)
    on_text = show(text, masses.text, "on text", **scale)
    figure.colorbar(on_text, cax=text_scale, orientation="horizontal").ax.tick_params(labelsize=7)
    show(method, ranks, "method", cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5)
    legend.axis("off")
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    legend.legend(handles=handles, loc="lower center", fontsize=7, ncols=2, frameon=False)
    local.set_yticks([*range(layers)], [printable(layer.name) for layer in plan.setting.layers])
