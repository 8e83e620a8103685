"""What the blocks of video autoencoders share: convolutions over frames and pixels, and norms over both.

Arrays are NFHWC: `F h w` are the frames and pixels of the level at hand.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.weights import matmul_precision
from dfa2_jax.vae.blocks import GroupNorm

MAX_SEEN = 2**30
"""Numbers of the neighbourhoods in time that a convolution reads at once; of bfloat16 they take 2 GiB. A chunk of 480 x
720 has twice as many in CogVideoX's widest convolution, and one of 768 x 1360 has six times as many."""


class FrameConv(nnx.Module):
    """A convolution over 3 x 3 pixels of three frames, the last of which is the frame that it computes.

    Kernel [frames, height, width, in, out]. It runs over pixels, with the channels of the three frames side by side. On
    an H200 that takes 0.5 to 0.8 of the time of cuDNN's convolution over frames. At 60 x 90 both take 0.6 ms.

    Args:
        around: what stands around each frame: zeros, or its outermost pixels again.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        around: Literal["zeros", "edge"] = "zeros",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = 3, 3, 3, in_channels, out_channels
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros((out_channels,), dtype))
        self.around = around
        self.precision = matmul_precision(dtype)

    def convolve(self, x: Float[Array, "B G h w C"]) -> Float[Array, "B F h w E"]:
        """All but the first two frames, some of them at a time (`MAX_SEEN`)."""
        frames, count = x.shape[1] - 2, x.size // x.shape[1]
        most = max(1, MAX_SEEN // (3 * count))
        together = max(n for n in range(1, min(most, frames) + 1) if frames % n == 0)

        def some(first: Int[Array, ""] | int) -> Float[Array, "B H h w E"]:
            return self.at_once(jax.lax.dynamic_slice_in_dim(x, first, together + 2, axis=1))

        if together == frames:
            return some(0)
        out = jnp.moveaxis(jax.lax.map(some, jnp.arange(0, frames, together)), 0, 1)
        return out.reshape(x.shape[0], frames, *out.shape[3:])

    def at_once(self, x: Float[Array, "B G h w C"]) -> Float[Array, "B F h w E"]:
        """All but the first two frames."""
        batch, frames, height, width, channels = x.shape
        if self.around == "edge":
            x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        seen = jnp.concatenate([x[:, t : t + frames - 2] for t in range(3)], axis=-1)
        out = jax.lax.conv_general_dilated(
            seen.reshape(-1, *x.shape[2:4], 3 * channels),
            jnp.moveaxis(self.kernel[...], 0, 2).reshape(3, 3, 3 * channels, -1),
            (1, 1),
            "VALID" if self.around == "edge" else "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision,
        )
        return (out + self.bias[...][None, None, None]).reshape(batch, frames - 2, height, width, -1)


class PixelConv(nnx.Module):
    """A product at each pixel, kernel [1, 1, 1, in, out]."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = 1, 1, 1, in_channels, out_channels
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros((out_channels,), dtype))
        self.precision = matmul_precision(dtype)

    def __call__(self, x: Float[Array, "B F h w C"]) -> Float[Array, "B F h w E"]:
        product = jnp.matmul(x, self.kernel[...][0, 0, 0], precision=self.precision)
        return product + self.bias[...][None, None, None, None]


def chunk_norm(norm: GroupNorm, x: Float[Array, "B F h w C"]) -> Float[Array, "B F h w C"]:
    """A group norm whose statistics are over all frames of the chunk."""
    batch, frames, height, width, channels = x.shape
    return norm(x.reshape(batch, frames * height, width, channels)).reshape(x.shape)


def after_first(x: Float[Array, "B F h w C"]) -> Float[Array, "B G h w C"]:
    """x with its first frame twice before it, which no frame stands before."""
    return jnp.concatenate([x[:, :1], x[:, :1], x], axis=1)


def repeat_pixels(x: Float[Array, "B F h w C"], times: int = 2) -> Float[Array, "B F y x C"]:
    """Each pixel `times` times in both directions: nearest-neighbour upsampling."""
    return jnp.repeat(jnp.repeat(x, times, axis=2), times, axis=3)
