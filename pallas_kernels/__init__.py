"""Attention kernels for MMDiT models. JAX only: knows no Flax, models, steps or plans."""

from .arrow import arrow_attention as arrow_attention
from .arrow import arrow_implementation as arrow_implementation
from .arrow import dense_implementation as dense_implementation
from .arrow import gpu_kind as gpu_kind
from .arrow import nested_arrow_attention as nested_arrow_attention
from .layout import CACHED as CACHED
from .layout import FULL as FULL
from .layout import Layout as Layout
from .mask import dense_mask as dense_mask
