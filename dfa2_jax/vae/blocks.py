"""Blocks of the autoencoder, in diffusers' arrangement and NHWC. `h w` are pixels of the level at hand."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.nn.linear import Linear
from dfa2_jax.nn.weights import matmul_precision

EPS = 1e-6  # of every group norm; diffusers writes it into the model, not into config.json

# Scores of the mid attention alive at once: 2**26 float32 are 256 MiB. A 2048 px image has 65,536 tokens, whose scores
# would take 16 GiB together.
MAX_SCORES = 2**26


def conv(
    in_channels: int,
    out_channels: int,
    size: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """`size` x `size`, kernel [height, width, in, out]; `padding` is (before, after), None keeps the size."""
    return nnx.Conv(
        in_channels,
        out_channels,
        kernel_size=(size, size),
        strides=stride,
        padding=(padding or (size // 2, size // 2),)
        * 2,  # a tuple: the graph of the module is a static, hashed argument
        dtype=dtype,
        param_dtype=dtype,
        precision=matmul_precision(dtype),
        rngs=rngs,
    )


class GroupNorm(nnx.Module):
    """Norm over the pixels and the channels of each group, in float32, rounded once."""

    def __init__(self, channels: int, num_groups: int, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((channels,), dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), dtype))
        self.num_groups = num_groups

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        scale, bias = (p[...].astype(jnp.float32)[None, None, None] for p in (self.scale, self.bias))
        x32 = x.astype(jnp.float32)
        centred = x32 - self.group_mean(x32)
        variance = self.group_mean(jnp.square(centred))
        return (centred * jax.lax.rsqrt(variance + EPS) * scale + bias).astype(x.dtype)

    def group_mean(self, x: Float[Array, "B h w C"]) -> Float[Array, "B 1 1 C"]:
        """Each channel's group mean; pixels first, so that the image itself is never regrouped."""
        batch, _, _, channels = x.shape
        means = x.mean((1, 2)).reshape(batch, self.num_groups, -1).mean(-1)
        return jnp.repeat(means, channels // self.num_groups, axis=-1)[:, None, None]


class ResnetBlock(nnx.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_channels, num_groups, dtype=dtype)
        self.conv1 = conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, num_groups, dtype=dtype)
        self.conv2 = conv(out_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        widens = in_channels != out_channels
        self.conv_shortcut = conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs) if widens else None

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w E"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def chunked_attention(
    q: Float[Array, "B T D"], k: Float[Array, "B S D"], v: Float[Array, "B S D"], *, max_scores: int = MAX_SCORES
) -> Float[Array, "B T D"]:
    """One-head attention that holds about `max_scores` scores at once: a scan over chunks of queries.

    Scores and softmax are float32. A chunk's keys are all present, so each softmax is exact and nothing is rescaled.
    """
    batch, num_tokens, width = q.shape
    precision = matmul_precision(q.dtype)
    num_chunks = min(num_tokens, -(-batch * num_tokens * k.shape[1] // max_scores))
    chunk = -(-num_tokens // num_chunks)

    def attend(queries: Float[Array, "B t D"]) -> Float[Array, "B t D"]:
        scores = jnp.einsum("BTD,BSD->BTS", queries, k, precision=precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * width**-0.5, axis=-1).astype(v.dtype)
        return jnp.einsum("BTS,BSD->BTD", weights, v, precision=precision)

    padded = jnp.pad(q, ((0, 0), (0, num_chunks * chunk - num_tokens), (0, 0)))
    out = jax.lax.map(attend, padded.reshape(batch, num_chunks, chunk, width).swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(batch, num_chunks * chunk, width)[:, :num_tokens]


class Attention(nnx.Module):
    """One-head attention over all pixels, with its residual."""

    def __init__(self, channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, num_groups, dtype=dtype)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Linear(channels, channels, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        out = chunked_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out(out).reshape(x.shape)


def resnet_chain(
    count: int, in_channels: int, out_channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> list[ResnetBlock]:
    """`count` resnet blocks, the first of which changes the width."""
    widths = [in_channels] + [out_channels] * count
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return [ResnetBlock(a, b, num_groups, dtype=dtype, rngs=rngs) for a, b in pairs]


class MidBlock(nnx.Module):
    def __init__(self, channels: int, num_groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resnets = nnx.List(resnet_chain(2, channels, channels, num_groups, dtype=dtype, rngs=rngs))
        self.attention = Attention(channels, num_groups, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return self.resnets[1](self.attention(self.resnets[0](x)))


class DownBlock(nnx.Module):
    """Resnet blocks, then halving by a strided convolution where `downsample`."""

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        num_groups: int,
        *,
        downsample: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(resnet_chain(count, in_channels, out_channels, num_groups, dtype=dtype, rngs=rngs))
        # diffusers pads one row below and one column right, and none above and left.
        self.downsampler = (
            conv(out_channels, out_channels, 3, stride=2, padding=(0, 1), dtype=dtype, rngs=rngs)
            if downsample
            else None
        )

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 E"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsampler is None else self.downsampler(x)


class UpBlock(nnx.Module):
    """Resnet blocks, then nearest-neighbour doubling and a convolution where `upsample`."""

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        num_groups: int,
        *,
        upsample: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(resnet_chain(count, in_channels, out_channels, num_groups, dtype=dtype, rngs=rngs))
        self.upsampler = conv(out_channels, out_channels, 3, dtype=dtype, rngs=rngs) if upsample else None

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 E"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsampler is None else self.upsampler(x.repeat(2, axis=1).repeat(2, axis=2))
