"""Looks at lowered programs: what a CPU cannot show about the numbers of a GPU."""

import re
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.lib.mlir import ir
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.triton import dialect as triton_dialect

PRODUCT = re.compile(r"stablehlo\.(dot_general|convolution)\b[^\n]*")


def lower_for_cuda(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Lower `function` as for an NVIDIA GPU, which needs none."""
    return jax.jit(function).trace(*args, **kwargs).lower(lowering_platforms=("cuda",))


def triton_kernels(function: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Triton IR of every Pallas kernel of `function`, by name, lowered as for an H200."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        module = lower_for_cuda(function, *args, **kwargs).compiler_ir("stablehlo")
    kernels = {}

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            config = operation.attributes["mhlo.backend_config"]
            context = ir.Context()
            triton_dialect.register_dialect(context)
            text = str(ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes, context=context))
            kernels[ir.StringAttr(config["name"]).value] = text
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return kernels


def assert_highest_precision(lowered: Any) -> None:
    """Every matrix product and convolution of a float32 program is float32 and asks for IEEE float32.

    At JAX's default precision they run as TF32 on NVIDIA (10 bits of mantissa), and no CPU result shows it.
    """
    products = [match.group(0) for match in PRODUCT.finditer(lowered.as_text())]
    assert products, "the program has no matrix product and no convolution"
    for line in products:
        assert len(re.findall(r"\bHIGHEST\b", line)) == 2, f"not at HIGHEST precision: {line}"
        assert not re.search(r"x(bf16|f16)>", line), f"not float32: {line}"


def largest_intermediate(function: Any, *args: Any) -> int:
    """Elements of the largest array that `function` computes, before any fusion; loop bodies included.

    For memory bounds this is firmer than a CPU's `memory_analysis`, which counts nothing inside YNN fusions. Dense
    attention over 16,384 tokens reports 0 bytes there and takes 1 GiB.
    """
    return max(variable.aval.size for variable in outputs(jax.make_jaxpr(function)(*args).jaxpr))


def outputs(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from outputs(inner)
