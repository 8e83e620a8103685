"""A plan for people: a summary, and a picture of every step, layer and head."""

from pathlib import Path
from typing import Any

import numpy as np

from dfa2_jax.io.atomic import replacing
from dfa2_jax.io.errors import printable
from dfa2_jax.plan.canvas import new_figure
from dfa2_jax.plan.method import NATIVE, TIME, Method
from dfa2_jax.plan.plan import Plan
from pallas_kernels.layout import CACHED, FULL
from pallas_kernels.mask import density


def summary(plan: Plan) -> str:
    """What it is for, how it was found, and what it does, in a dozen lines."""
    setting, origin = plan.setting, plan.calibration
    densities = density_table(plan).mean(1)
    layers = f"{len(setting.layers)} layers x {setting.num_heads} heads"
    guided = ", guided" if setting.doubled_batch else ""
    lines = {
        "model": f"{setting.pipeline_class}, {layers}, weights {setting.weights[:12]}",
        "image" if setting.num_frames is None else "video": f"{setting.size_in_words}, {plan.steps_in_words}{guided}",
        "methods": ", ".join(f"{method} {share:.1%}" for method, share in plan.shares().items()),
        "density": f"{plan.density():.3f} of query-key pairs; a step {densities.min():.3f} to {densities.max():.3f}",
        "digest": plan.digest + (", edited by hand" if plan.edited else ""),
    }
    steps = plan.step_calibration
    if not plan.runs_every_step:
        lines["steps"] = f"{', '.join(map(str, plan.nodes))}: {1 / plan.cost():.2f} times as fast"
        if steps is not None and steps.attention_share:
            lines["steps"] += f" with these heads, where attention is {steps.attention_share:.2f} of a step"
        pairs = [f"({now:.4f}, {last:.4f})" for now, last in plan.coefficients.round(4) + 0.0]
        lines["moves by"] = f"{' '.join(pairs)} of a node's velocity and the last one's"
    edited = ", before it was edited" if plan.edited else ""
    if steps is not None:
        kind = ("predicted" if steps.measured_error is None else "measured on them") + edited
        found = f"{steps.num_prompts} prompts, seed {steps.seed}"
        lines["steps from"] = f"{found}: PSNR {steps.psnr:.1f} dB to {steps.target} images, {kind}"
    if origin is not None:
        queries, keys = origin.tiles
        lines["density"] += f"; {plan.density(origin.tiles):.3f} of tiles of {queries} x {keys}"
        lines["found with"] = f"{origin.num_prompts} prompts, seed {origin.seed}, delta {origin.delta}, c {origin.c}"
        spent = np.array(origin.errors)[1:]
        if spent.size:
            lines["errors"] = (
                f"{spent.mean():.4f} of delta {origin.delta} on average in a layer, {spent.max():.4f} at most{edited}"
            )
    return "\n".join(f"{name:11s} {printable(line)}" for name, line in lines.items())


def density_table(plan: Plan) -> np.ndarray:
    """Kept share of query-key pairs, [steps, layers]."""
    windows = plan.half_windows()
    columns = [
        density(windows[:, number].ravel(), layer.layout).reshape(len(windows), -1).mean(1)
        for number, layer in enumerate(plan.setting.layers)
    ]
    return np.stack(columns, axis=1)


def draw(plan: Plan, path: Path) -> None:
    """A PNG of the steps that run, and of the method of every head, with the kept share of each step and layer.

    Steps go from left to right, layers from top to bottom, and the heads of a layer lie side by side. What is as in a
    dense run is left out: steps, or heads.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    steps, layers, _ = plan.choices.shape
    width, heights = 3 + min(0.35 * steps, 15), []
    if not plan.runs_every_step:
        heights.append(3.0)
    if plan.runs_every_step or not plan.heads_are_full:
        heights.append(2 + min(0.2 * layers, 14))
    with new_figure(width, sum(heights), "The picture of a plan") as figure:
        parts = np.ravel(figure.subfigures(len(heights), 1, height_ratios=heights))
        if not plan.runs_every_step:
            _fill_steps(parts[0], plan)
        if plan.runs_every_step or not plan.heads_are_full:
            _fill_heads(parts[-1], plan)
        figure.suptitle(_title(plan), fontsize=10)
        with replacing(Path(path)) as file:
            figure.savefig(file, format="png", dpi=110)


def _title(plan: Plan) -> str:
    heads = "every head in full" if plan.heads_are_full else f"{plan.density():.2f} of query-key pairs kept"
    return f"{printable(plan.setting.pipeline_class)}: {plan.steps_in_words}, {heads}"


def _fill_steps(figure: Any, plan: Plan) -> None:
    """Noise levels with the nodes among them, and how far x moves beside what Euler's step would."""
    from matplotlib.ticker import MaxNLocator

    sigmas, nodes = np.array(plan.setting.sigmas), [*plan.nodes, len(plan.setting.sigmas) - 1]
    levels, moves = figure.subplots(2, 1, sharex=True)
    levels.plot(sigmas, ".", color="lightgrey", label="noise level")
    levels.plot(nodes, sigmas[nodes], "-o", color="#20124d", markersize=4, linewidth=0.8, label="the network runs")
    levels.set(ylabel="noise level")
    levels.legend(fontsize=7)
    euler = np.diff(sigmas[nodes])
    for offset, name, colour in ((-0.2, "this velocity", "#20124d"), (0.2, "the last one", "#f4a259")):
        share = plan.coefficients[:, int(offset > 0)] / euler
        moves.bar(np.array(plan.nodes) + offset, share, 0.4, color=colour, label=name)
    moves.axhline(1, color="grey", linewidth=0.6)
    moves.set(xlabel="step", ylabel="of Euler's move")
    moves.legend(fontsize=7, loc="lower left")
    moves.xaxis.set_major_locator(MaxNLocator(integer=True))


def _fill_heads(figure: Any, plan: Plan) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    steps, layers, heads = plan.choices.shape
    ranks, names, colours = ranked(plan)
    picture = ranks.transpose(1, 0, 2).reshape(layers, steps * heads)

    axes = figure.subplots(2, 2, sharex="col", sharey="row", width_ratios=(5, 1), height_ratios=(1, 6))
    table, (top, corner), (atlas, side) = density_table(plan), axes[0], axes[1]
    atlas.imshow(
        picture, ListedColormap(colours), aspect="auto", interpolation="nearest", vmin=-0.5, vmax=len(names) - 0.5,
        extent=(-0.5, steps - 0.5, layers - 0.5, -0.5),
    )  # fmt: skip
    for step in range(steps - 1):
        atlas.axvline(step + 0.5, color="white", linewidth=0.6)
    shown = range(0, layers, max(1, layers // 40))
    atlas.set_yticks([*shown], [printable(plan.setting.layers[number].name) for number in shown], fontsize=7)
    if plan.runs_every_step:
        atlas.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        atlas.set_xticks(range(steps), plan.nodes)
    atlas.set(xlabel="step (within it, heads from left to right)", ylabel="layer")
    top.bar(np.arange(steps), table.mean(1), color="grey")
    top.set(ylim=(0, 1), ylabel="kept")
    side.barh(np.arange(layers), table.mean(0), color="grey")
    side.set(xlim=(0, 1), xlabel="kept")
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    corner.axis("off")
    corner.legend(handles=handles, loc="center", fontsize=7)


def ranked(plan: Plan) -> tuple[np.ndarray, list[str], list[Any]]:
    """For pictures: the rank [steps, layers, heads] of every choice, and names and colours of the methods by rank, from
    most work to least."""
    from matplotlib import colormaps

    order = sorted(range(len(plan.methods)), key=lambda number: _work(plan.methods[number]), reverse=True)
    names = [str(plan.methods[number]) for number in order]
    colours: dict[str, Any] = {"full": "#20124d", "cached": "#f4a259"}
    for map_name, over in (("YlGnBu", NATIVE), ("PuRd", TIME)):
        arrows = [name for name in names if name not in ("full", "cached") and Method(name).order == over]
        shades = colormaps[map_name](np.linspace(0.75, 0.3, len(arrows)))
        colours |= dict(zip(arrows, map(tuple, shades), strict=True))
    return np.argsort(order)[plan.choices], names, [colours[name] for name in names]


def _work(method: Method) -> int:
    """Larger for methods that compute more."""
    window = method.half_window(1 << 20)
    return {FULL: 1 << 30, CACHED: -1}.get(window, window)
