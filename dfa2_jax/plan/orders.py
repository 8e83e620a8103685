"""In which order of the visual tokens heads have their bands, and their outputs."""

import numpy as np
from jaxtyping import Int

from dfa2_jax.plan.method import ORDERS
from dfa2_jax.plan.plan import Plan
from pallas_kernels.layout import CACHED

Orders = Int[np.ndarray, "nodes layers heads"]
"""Numbers of `plan.method.ORDERS`."""


def orders(plan: Plan) -> Orders:
    """The order of every band; 0, native, of heads that have none."""
    return np.array([ORDERS.index(method.order) for method in plan.methods], np.int32)[plan.choices]


def lies(plan: Plan) -> Orders:
    """The order of every head's output as a node leaves it: its band's, and a reused one as it lay."""
    written, is_cached = orders(plan), plan.half_windows() == CACHED
    for node in range(1, len(written)):
        written[node] = np.where(is_cached[node], written[node - 1], written[node])
    return written
