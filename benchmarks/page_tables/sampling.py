"""Steps by plans, and dense steps."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.page_tables.base import span, table, title

SHARES = ("0.69", "0.57", "0.44", "0.32")
"""Shares of the query-key pairs that the plans of benchmarks/sampling.py keep on a GPU."""


@table("speedups", "sampling_h100.json", "model | size | dense step, ms | step by a plan, ms | speedup")
def speedups(data: Any) -> Iterator[list[str]]:
    """The README's: the smallest plans, half of whose saving is by reuse."""
    for case, found in sorted(data["rows"].items()):
        model, pixels = case.split()
        ms = found["ms_per_step"]
        gain = found["plans"]["mixed 0.32"]["speedup"]
        yield [model, f"{pixels} px", f"{ms['dense']:.0f}", f"{ms['mixed 0.32']:.0f}", f"{gain:.2f}x"]


def sampling(kind: str) -> Callable[[Any], Iterator[list[str]]]:
    """Milliseconds and speedup of one kind of plan, for every share of the pairs."""

    def rows(data: Any) -> Iterator[list[str]]:
        for case, found in sorted(data["rows"].items()):
            ms, plans = found["ms_per_step"], found["plans"]
            chosen = [f"{kind} {share}" for share in SHARES]
            cells = [f"{ms[plan]:.0f}, {plans[plan]['speedup']:.2f}x" for plan in chosen]
            yield [title(case), f"{ms['dense']:.0f}", f"{ms['without attention']:.0f}", *cells]

    return rows


PLANS = "model | dense, ms | no attention, ms | keeps 0.69 | keeps 0.57 | keeps 0.44 | keeps 0.32"
for kind in ("mixed", "reuse", "arrows"):
    table(f"sampling-{kind}", "sampling_h100.json", PLANS)(sampling(kind))
table("sampling-h200", "sampling_gpu.json", PLANS)(sampling("mixed"))


@table("sampling-limits", "sampling_h100.json", "model | dense, ms | all heads cached, ms | speedup | peak memory, GB")
def sampling_limits(data: Any) -> Iterator[list[str]]:
    for case, found in sorted(data["rows"].items()):
        ms, gain = found["ms_per_step"], found["plans"]["all cached"]["speedup"]
        yield [title(case), f"{ms['dense']:.0f}", f"{ms['all cached']:.0f}", f"{gain:.1f}x", f"{found['peak_gb']:.1f}"]


@table("sampling-cudnn", "sampling_h100.json", "model | dense by cuDNN, ms | dense as shipped, ms | cuDNN / shipped")
def sampling_cudnn(data: Any) -> Iterator[list[str]]:
    for case, found in sorted(data["rows"].items()):
        ms = found["ms_per_step"]
        if "dense by cuDNN" in ms:
            ratio = ms["dense by cuDNN"] / ms["dense"]
            yield [title(case), f"{ms['dense by cuDNN']:.0f}", f"{ms['dense']:.0f}", f"{ratio:.2f}"]


def of_ceiling(data: Any) -> Iterator[list[str]]:
    """Share of what Amdahl's law allows, by kind of plan."""
    for case, found in sorted(data["rows"].items()):
        spans = []
        for kind in ("mixed", "reuse", "arrows"):
            spans.append(span(plan["of_ceiling"] for name, plan in found["plans"].items() if name.startswith(kind)))
        yield [title(case) if "tokens" not in case else case, *spans]


CEILINGS = "model | half by reuse, half by arrows | by reuse | by arrows"
table("ceilings-h100", "sampling_h100.json", CEILINGS)(of_ceiling)
table("ceilings-cpu", "sampling_cpu.json", CEILINGS)(of_ceiling)


@table("first-calls", "sampling_h100.json", "model | dense, s | by a plan, s")
def first_calls(data: Any) -> Iterator[list[str]]:
    for case, found in sorted(data["rows"].items()):
        seconds = found["first_call_s"]
        yield [title(case), f"{seconds['dense']:.0f}", f"{seconds['planned']:.0f}"]


@table(
    "unrolled",
    "sampling_unrolled_h100.json",
    "model | scanned, ms | unrolled, ms | unrolled / scanned",
    "python -m benchmarks.sampling --unrolled",
)
def unrolled(data: Any) -> Iterator[list[str]]:
    for case, found in sorted(data["rows"].items()):
        ms = found["ms_per_step"]
        ratio = ms["dense unrolled"] / ms["dense"]
        yield [title(case), f"{ms['dense']:.1f}", f"{ms['dense unrolled']:.1f}", f"{ratio:.2f}"]


@table("rival", "rival_h100.json", "model | ours, ms | diffusers eager, ms | diffusers compiled, ms | compiled / ours")
def rival(data: Any) -> Iterator[list[str]]:
    for case, found in sorted(data["rows"].items()):
        ms = found["ms_per_step"]
        names = ("ours", "diffusers eager", "diffusers torch.compile")
        ratio = found["diffusers_over_ours"]["diffusers torch.compile"]
        yield [title(case), *(f"{ms[name]:.0f}" for name in names), f"{ratio:.2f}"]


@table("forward", "forward.json", "model | visual tokens | diffusers eager / ours | diffusers compiled / ours")
def forward(data: Any) -> Iterator[list[str]]:
    for found in data["rows"]:
        ratios = found["diffusers_over_ours"]
        cells = [f"{ratios[name]:.2f}" for name in ("diffusers eager", "diffusers torch.compile")]
        yield [found["model"], f"{found['visual_tokens']:,}", *cells]


@table(
    "profile",
    "profile_h100.json",
    "model | products, ms | attention, ms | copies, ms | the rest, ms | step, ms",
)
def profile(data: Any) -> Iterator[list[str]]:
    for case, found in data["rows"].items():
        step, ms = found["ms_per_step"]["shipped"], found["kernels"]["shipped"]["ms"]
        kinds = [ms[name] for name in ("products", "attention", "copies")]
        yield [title(case), *(f"{one:.1f}" for one in kinds), f"{step - sum(kinds):.1f}", f"{step:.1f}"]


@table("xla-options", "profile_h100.json", "model | with `XLA_OPTIONS`, ms | without, ms | without / with")
def xla_options(data: Any) -> Iterator[list[str]]:
    for case, found in data["rows"].items():
        ms = found["ms_per_step"]
        yield [title(case), f"{ms['shipped']:.1f}", f"{ms['without']:.1f}", f"{found['without_over_shipped']:.2f}"]


@table("predicted", "profile_h100.json", "FLUX.1-dev | products, ms | attention, ms | the rest, ms | step, ms")
def predicted(data: Any) -> Iterator[list[str]]:
    """Predicted from 24 x 57 x 3072^2 x N operations in products and 4 x 57 x 3072 x N^2 in attention. The rates were
    assumed before the kernels were written: 0.70 and 0.68 to 0.70 PFLOP/s, and 3.9 us a token for the rest."""
    for pixels, attention_rate in ((1024, 0.68e15), (2048, 0.70e15)):
        tokens = 512 + (pixels // 16) ** 2
        parts = [24 * 57 * 3072**2 * tokens / 0.70e15, 4 * 57 * 3072 * tokens**2 / attention_rate, 3.9e-6 * tokens]
        yield [f"{pixels} px, predicted", *(f"{1e3 * one:.0f}" for one in parts), f"{1e3 * sum(parts):.0f}"]
        found = data["rows"][f"FLUX.1-dev {pixels}"]
        step, ms = found["ms_per_step"]["shipped"], found["kernels"]["shipped"]["ms"]
        rest = step - ms["products"] - ms["attention"]
        yield [f"{pixels} px, measured", *(f"{one:.0f}" for one in (ms["products"], ms["attention"], rest, step))]


@table("goals", "sampling_h100.json", "goal | asked | measured")
def goals(data: Any) -> Iterator[list[str]]:
    """What was asked for before it was measured, where it was missed; and one that reuse alone reaches."""
    flux = data["rows"]["FLUX.1-dev 2048"]
    gains = [flux["plans"][f"{kind} 0.32"]["speedup"] for kind in ("reuse", "mixed", "arrows")]
    by_kind = "{:.2f}x by reuse, {:.2f}x mixed, {:.2f}x by arrows".format(*gains)
    yield ["dense step of FLUX.1-dev at 2048 px", "670 ms", f"{flux['ms_per_step']['dense']:.0f} ms"]
    yield ["plan that keeps 0.32, FLUX.1-dev at 2048 px", "1.6x", by_kind]
