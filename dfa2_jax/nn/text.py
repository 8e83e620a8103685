"""What the text encoders share: tables, small attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.nn.weights import matmul_precision


def embedding(rows: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param:
    """A table [rows, width]; 0.02 is the spread transformers initialises CLIP's tables with."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, width), dtype))


def biased_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    bias: Float[Array, "#N T S"],
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`softmax(scale * q k + bias) v`; scores and softmax in float32, every score in memory (prompts are short)."""
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scale * scores + bias[None], axis=-1).astype(q.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v, precision=precision)
