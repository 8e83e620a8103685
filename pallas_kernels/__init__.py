"""Kernels for MMDiT models: attention, 8-bit products. JAX only: knows no Flax, models, steps or plans."""

from pallas_kernels.api import arrow_attention, nested_arrow_attention
from pallas_kernels.backends.base import Backend, Device, Problem
from pallas_kernels.backends.registry import register
from pallas_kernels.devices import arrow_implementation, dense_implementation, gpu_kind
from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import dense_mask
from pallas_kernels.products import quantized_matmul

__all__ = [
    "Backend",
    "CACHED",
    "Device",
    "FULL",
    "Layout",
    "Problem",
    "arrow_attention",
    "arrow_implementation",
    "dense_implementation",
    "dense_mask",
    "gpu_kind",
    "nested_arrow_attention",
    "quantized_matmul",
    "register",
]
