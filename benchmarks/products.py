"""Products of 8-bit operands at the models' shapes: the error against float32's, and the time beside bfloat16's.

    python -m benchmarks.products [--only FLUX] [--rounds 5] [--out benchmarks/results/products_gpu.json]

Operands are drawn from a normal distribution, and become 8 bits by rows. The error is that of the product alone: the
float32 product of the same 8-bit values is the truth. Its limit is 0.004, and 0.03 where the result is float8. Layers
of the stack of weights take turns. One JSON row for each product, which is kept where --only names others; exit code 1
if one is wrong.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.attention import measure
from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from pallas_kernels.passes import quantized_rows
from pallas_kernels.products import IMPLEMENTATIONS, quantized_matmul

LAYERS = 4
DTYPES = {"float8": jnp.float8_e4m3fn, "int8": jnp.int8}


class Case(NamedTuple):
    """gelu: GELU to float8 with a scale for each row. heads: named, of `head_dim`. second: depth of a second pair."""

    name: str
    rows: int
    depth: int
    columns: int
    gelu: bool = False
    heads: int | None = None
    head_dim: int = 128
    second: int | None = None


def of_model(name: str, rows: int, width: int, head_dim: int) -> list[Case]:
    """The products of a block."""
    return [
        Case(f"{name} q k v", rows, width, 3 * width),
        Case(f"{name} q k v of a third", rows, width, 3 * width, heads=width // head_dim, head_dim=head_dim),
        Case(f"{name} out", rows, width, width),
        Case(f"{name} up, gelu", rows, width, 4 * width, gelu=True),
        Case(f"{name} down", rows, 4 * width, width),
    ]


CASES = [
    Case("ragged", 129, 256, 384, second=128),
    *of_model("FLUX 1K", 4608, 3072, 128),
    Case("FLUX 1K out and down at once", 4608, 3072, 3072, second=12288),
    Case("FLUX 1K text, up", 512, 3072, 12288),
    *of_model("FLUX 2K", 16896, 3072, 128),
    *of_model("SD3.5-large 1K", 8192, 2432, 64),
    *of_model("SD3.5-medium 1K", 8192, 1536, 64),
]
if jax.default_backend() == "cpu":
    CASES = CASES[:1]


class Operands:
    def __init__(self, case: Case, dtype: str):
        keys = iter(jax.random.split(jax.random.key(0), 8))
        self.case, self.dtype = case, dtype

        def draw(*shape: int) -> tuple[jax.Array, jax.Array]:
            return quantized_rows(jax.random.normal(next(keys), shape, jnp.bfloat16), DTYPES[dtype])

        x, row_scale = draw(case.rows, case.depth)
        w, column_scale = draw(LAYERS, case.columns, case.depth)
        bias = jax.random.normal(next(keys), (LAYERS, case.columns), jnp.bfloat16)
        self.given: dict[str, Any] = {
            "x": x, "w": w, "row_scale": row_scale, "column_scale": column_scale, "bias": bias,
        }  # fmt: skip
        if case.second is not None:
            self.given["second"] = (draw(case.rows, case.second)[0], draw(LAYERS, case.columns, case.second)[0])
        if case.heads is not None:
            every = jax.random.permutation(next(keys), case.columns // case.head_dim)
            self.given["heads"] = every[: case.heads].astype(jnp.int32)
        if case.gelu:
            self.given["out_scale"] = jnp.full(case.rows, 2.0**-3 * case.depth**0.5 / 8, jnp.float32)
        self.options = {"head_dim": case.head_dim}
        if case.gelu:
            self.options |= {"activation": "gelu_tanh", "out_dtype": jnp.float8_e4m3fn}

    def call(self, implementation: str) -> Callable[[], jax.Array]:
        multiply = jax.jit(partial(quantized_matmul, implementation=implementation, **self.options))
        layer = cycle(jnp.arange(LAYERS))
        return lambda: multiply(**self.given, layer=next(layer))

    def in_bfloat16(self) -> Callable[[], jax.Array]:
        """The same product of bfloat16 operands, of as many columns, as a layer without 8 bits has it."""
        x = self.given["x"].astype(jnp.bfloat16)
        depth, columns = x.shape[1], len(self.given.get("heads", ())) * self.case.head_dim or self.case.columns
        if self.case.second is not None:
            x = jnp.concatenate([x, self.given["second"][0].astype(jnp.bfloat16)], axis=1)
            depth += self.case.second
        kernels = [jax.random.normal(jax.random.key(i), (depth, columns), jnp.bfloat16) for i in range(LAYERS)]
        kernel, multiply = cycle(kernels), jax.jit(jnp.dot)
        return lambda: multiply(x, next(kernel))

    def exact(self) -> jax.Array:
        """The product of layer 0 in float32."""

        @jax.jit
        def multiply(given: dict[str, Any]) -> jax.Array:
            product = partial(jnp.einsum, "mk,ek->me", precision=jax.lax.Precision.HIGHEST)
            pairs = [(given["x"], given["w"][0])]
            pairs += [(given["second"][0], given["second"][1][0])] if "second" in given else []
            total = sum(product(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs)
            total = total * given["row_scale"][:, None] * given["column_scale"][0] + given["bias"][0]
            if "heads" in given:
                total = total.reshape(total.shape[0], -1, self.case.head_dim)[:, given["heads"]]
                total = total.reshape(total.shape[0], -1)
            return jax.nn.gelu(total, approximate=True) if self.case.gelu else total

        return multiply(self.given)

    def error(self, result: jax.Array) -> float:
        wide = result.astype(jnp.float32)
        if self.case.gelu:
            wide = wide * self.given["out_scale"][:, None]
        truth = self.exact()
        return float(jnp.linalg.norm(wide - truth) / jnp.linalg.norm(truth))


def results(case: Case, dtype: str, rounds: int) -> dict[str, Any]:
    operands = Operands(case, dtype)
    calls = {"bfloat16": operands.in_bfloat16()}
    calls |= {name: operands.call(name) for name in IMPLEMENTATIONS}
    outcome: dict[str, Any] = {"errors": {}, "refused": {}}
    for name in IMPLEMENTATIONS:
        try:
            outcome["errors"][name] = operands.error(calls[name]())  # its first call is of layer 0
        except NotImplementedError as why:
            outcome["refused"][name] = str(why)
            del calls[name]
    outcome["ms"] = {name: 1e3 * median(times) for name, times in measure(calls, rounds).items()}
    limit = 0.03 if case.gelu else 0.004
    outcome["right"] = all(error < limit for error in outcome["errors"].values())
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/products_{jax.default_backend()}.json"))
    args = parser.parse_args()
    machine = {"machine": describe_machine(), "device": jax.devices()[0].device_kind}
    kept = json.loads(args.out.read_text())["rows"] if args.only and args.out.exists() else {}
    cases = {f"{case.name}, {dtype}": (case, dtype) for case, dtype in product(CASES, DTYPES) if args.only in case.name}
    for name, (case, dtype) in cases.items():
        kept[name] = measured = machine | results(case, dtype, args.rounds)
        ms = ", ".join(f"{way} {1e3 * value:.0f}" for way, value in measured["ms"].items())
        errors = ", ".join(f"{way} {value:.4f}" for way, value in measured["errors"].items())
        print(f"{'' if measured['right'] else 'WRONG '}{name}: us {ms}; errors {errors}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps({"rows": kept}, indent=1) + "\n")
    raise SystemExit(not all(kept[name]["right"] for name in cases))


if __name__ == "__main__":
    main()
