"""Attention kernels for MMDiT models. JAX only: knows no Flax, models, steps or plans."""

from .arrow import arrow_attention as arrow_attention
from .arrow import dense_implementation as dense_implementation
from .layout import CACHED as CACHED
from .layout import FULL as FULL
from .layout import Layout as Layout
from .mask import dense_mask as dense_mask
