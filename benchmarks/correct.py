"""Every implementation on this machine's device against attention in float64: one JSON row for each, exit code 1 if
one is wrong.

    python -m benchmarks.correct [--only FLUX] [--out benchmarks/results/correct_gpu.json]

Six heads each: full, V/16, V/64, 0 and 10 V tokens on each side, and a cached one. Inputs are drawn anew for each case;
what the heads that compute find in the cache is NaN. A head may have twice the error of plain XLA attention in
the same dtype, and `UNITS` in the last place of its largest output. The cached head must be right to the bit, and every
position written. Nested calls: each of five outputs.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from pallas_kernels import CACHED, FULL, Layout, arrow_attention, dense_mask, nested_arrow_attention
from pallas_kernels.backends.registry import BACKENDS


class Case(NamedTuple):
    name: str
    batch: int
    head_dim: int
    layout: Layout


CASES = [
    Case("one token", 1, 64, Layout(0, 1, True)),
    Case("ragged, text first", 2, 64, Layout(77, 1023, True)),
    Case("ragged, text last", 3, 128, Layout(129, 801, False)),
    Case("no text", 1, 128, Layout(0, 999, True)),
    Case("much text", 1, 64, Layout(1000, 65, False)),
    Case("SD3 1K", 2, 64, Layout(333, 4096, False)),
    Case("SD3 2K", 1, 64, Layout(333, 16384, False)),
    Case("FLUX 1K", 1, 128, Layout(512, 4096, True)),
    Case("FLUX 2K", 1, 128, Layout(512, 16384, True)),
]
DTYPES = ("bfloat16", "float16", "float32")
UNITS = {"bfloat16": 4, "float16": 4, "float32": 64}
"""Units of rounding that are allowed: 16 bits are summed in float32, float32 in sums as long as the sequence."""


@partial(jax.jit, static_argnames=("layout", "dtype"))
def exact(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array, layout: Layout, dtype: str) -> jax.Array:
    """One head [B, T, H] in plain XLA, all of it in `dtype`, 1,024 queries at a time; products of float32 as IEEE has
    them."""
    kept = dense_mask(window[None], layout)[0]
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def attend(query: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, kept = query
        scores = product("bh,bsh->bs", q, k) * q.shape[-1] ** -0.5
        return product("bs,bsh->bh", jax.nn.softmax(jnp.where(kept, scores, -jnp.inf).astype(dtype)), v)

    return jax.lax.map(attend, (q.swapaxes(0, 1), kept), batch_size=1024).swapaxes(0, 1)


class Truth:
    """What a case must give, and how far plain XLA is from it in the dtype of the case."""

    def __init__(self, case: Case, dtype: str, seed: int):
        generator = np.random.default_rng(seed)
        visual = case.layout.num_visual
        self.windows = np.array([FULL, visual // 16, visual // 64, 0, 10 * visual, CACHED], np.int32)
        size = case.batch, case.layout.length, len(self.windows), case.head_dim
        self.q, self.k, self.v, noise = (
            jnp.asarray(generator.standard_normal(size, np.float32), dtype) for _ in range(4)
        )
        computed = self.windows != CACHED
        self.cache = jnp.where(jnp.asarray(computed)[:, None], jnp.nan, noise)
        self.case, self.dtype = case, dtype

    def head(self, head: int, window: int, dtype: str) -> jax.Array:
        q, k, v = (x[:, :, head] for x in (self.q, self.k, self.v))
        with jax.enable_x64(dtype == "float64"):
            return exact(q, k, v, jnp.int32(window), self.case.layout, dtype)

    def judge(self, out: jax.Array, head: int, window: int) -> tuple[float, float]:
        """The error of one head, and what is allowed."""
        want, of_xla, out = (
            np.asarray(x, np.float64)
            for x in (self.head(head, window, "float64"), self.head(head, window, self.dtype), out)
        )
        rounding = UNITS[self.dtype] * float(jnp.finfo(self.dtype).eps) * float(np.abs(want).max())
        return float(np.abs(out - want).max()), 2 * float(np.abs(of_xla - want).max()) + rounding


def results(truth: Truth, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each implementation and operation; one that refuses the case says why."""
    layout, windows = truth.case.layout, truth.windows
    row = {"case": truth.case.name, "dtype": truth.dtype}
    ladder = np.unique([0, layout.num_visual // 64, layout.num_visual // 16, layout.num_visual // 4])
    for name in names:
        options = {"layout": layout, "implementation": name}
        for op in ("arrow", "nested", "dense"):
            row |= {"implementation": name, "op": op}
            try:
                if op == "arrow":
                    attend = jax.jit(partial(arrow_attention, **options), donate_argnames="cache")
                    out = attend(truth.q, truth.k, truth.v, jnp.asarray(windows), cache=truth.cache + 0)
                    checks = [(out[:, :, i], i, w) for i, w in enumerate(windows) if w != CACHED]
                    cached = bool((out[:, :, -1] == truth.cache[:, :, -1]).all())
                elif op == "nested":
                    q, k, v = (x[:, :, :2] for x in (truth.q, truth.k, truth.v))
                    nested = jax.jit(partial(nested_arrow_attention, **options))(
                        q, k, v, jnp.asarray(ladder, jnp.int32)
                    )
                    checks = [
                        (out[:, :, i], i, w) for out, w in zip(nested, [*ladder, FULL], strict=True) for i in range(2)
                    ]
                    cached = True
                else:
                    out = jax.jit(partial(arrow_attention, **options))(truth.q, truth.k, truth.v)
                    checks, cached = [(out[:, :, i], i, FULL) for i in range(len(windows))], True
            except NotImplementedError as error:
                yield row | {"refused": str(error)}
                continue
            judged = [truth.judge(*check) for check in checks]
            share, error = max((error / limit, error) for error, limit in judged)
            right = cached and all(error <= limit for error, limit in judged)  # a NaN is not
            yield row | {"right": right, "error": error, "share_of_limit": share, "cached_to_the_bit": cached}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    tested = [name for name in BACKENDS if name != "reference"]
    parser.add_argument("--implementation", choices=tested, nargs="+", default=tested, help="only these")
    kind = "gpu" if jax.default_backend() == "gpu" else "cpu"
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/correct_{kind}.json"))
    args = parser.parse_args()
    todo = [
        (case, dtype) for case in CASES if args.only in case.name for dtype in DTYPES if args.dtype in (None, dtype)
    ]
    rows: list[dict[str, Any]] = []
    for seed, (case, dtype) in enumerate(tqdm(todo)):
        rows += results(Truth(case, dtype, seed), args.implementation)
        content = {"machine": describe_machine(), "device": jax.devices()[0].device_kind, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(content, indent=1) + "\n")
    wrong = [row for row in rows if row.get("right") is False]
    ran = [row for row in rows if "right" in row]
    print(f"{len(ran) - len(wrong)} of {len(ran)} right; {len(rows) - len(ran)} refused.")
    for row in wrong:
        print(f"wrong: {row}")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    raise SystemExit(main())
