"""Attention kernels for MMDiT models. JAX only: knows no Flax, models, steps or plans."""

from pallas_kernels.api import arrow_attention as arrow_attention
from pallas_kernels.api import arrow_implementation as arrow_implementation
from pallas_kernels.api import dense_implementation as dense_implementation
from pallas_kernels.api import gpu_kind as gpu_kind
from pallas_kernels.api import nested_arrow_attention as nested_arrow_attention
from pallas_kernels.layout import CACHED as CACHED
from pallas_kernels.layout import FULL as FULL
from pallas_kernels.layout import Layout as Layout
from pallas_kernels.mask import dense_mask as dense_mask
