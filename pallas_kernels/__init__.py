"""Attention kernels for MMDiT models. JAX only: knows no Flax, models, steps or plans."""

from pallas_kernels.api import arrow_attention as arrow_attention
from pallas_kernels.api import nested_arrow_attention as nested_arrow_attention
from pallas_kernels.backends.base import Backend as Backend
from pallas_kernels.backends.base import Device as Device
from pallas_kernels.backends.base import Problem as Problem
from pallas_kernels.backends.registry import register as register
from pallas_kernels.devices import arrow_implementation as arrow_implementation
from pallas_kernels.devices import dense_implementation as dense_implementation
from pallas_kernels.devices import gpu_kind as gpu_kind
from pallas_kernels.layout import CACHED as CACHED
from pallas_kernels.layout import FULL as FULL
from pallas_kernels.layout import Layout as Layout
from pallas_kernels.mask import dense_mask as dense_mask
