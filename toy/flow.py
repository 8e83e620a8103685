"""The second phase: the transformer and its text encoders learn the velocity from image to noise."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfa2_jax.encoders.t5 import T5Encoder
from dfa2_jax.families.sd3.positions import crop_positions
from dfa2_jax.families.sd3.transformer import SD3Conditions
from dfa2_jax.nn.attention import LayerPlan
from toy import model
from toy.autoencoder import moments
from toy.data import draw
from toy.networks import Lookup, Setup
from toy.stages import Part

DROPPED = 0.12
"""Share of captions replaced by the empty one, for classifier-free guidance."""
UNIFORM = 0.2
"""Share of noise levels drawn evenly: the logit-normal hardly draws above 0.98, where a sampler decides the layout."""


@dataclass(frozen=True)
class Attention:
    """Attention that has a gradient: the library's arrow attention refuses one."""

    implementation: str | None = None

    def memory(self, stack: jax.ShapeDtypeStruct) -> None:
        return None

    def __call__(self, project: Any, layout: Any, memory: None, plan: LayerPlan | None) -> tuple[jax.Array, None]:
        return jax.nn.dot_product_attention(*project(), implementation=self.implementation), None


def best_attention(dtype: Any) -> str:
    """cuDNN's where its forward and backward compile, else XLA's."""
    if jax.default_backend() != "gpu" or dtype == jnp.float32:
        return "xla"
    x = jnp.zeros((2, 120, model.HEADS, model.WIDTH // model.HEADS), dtype)
    try:
        loss = jax.grad(lambda x: Attention("cudnn")(lambda: (x, x, x), None, None, None)[0].sum().astype(jnp.float32))
        jax.block_until_ready(jax.jit(loss)(x))
    except Exception as error:  # whatever this version of cuDNN lacks
        print(f"cuDNN attention is not usable here ({str(error)[:120]!r}): XLA's in its place", flush=True)
        return "xla"
    return "cudnn"


def traced_sinusoid(x: jax.Array, dim: int = 256) -> jax.Array:
    """`dfa2_jax.sampling.sinusoid.sinusoid`, traced."""
    half = dim // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / half).astype(np.float32)
    angles = x[:, None] * jnp.asarray(frequencies)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def patchify(latents: jax.Array) -> jax.Array:
    """[B, h, w, C] as tokens of (row, column, channel), [B, V, 4 C]."""
    batch, height, width, channels = latents.shape
    grid = latents.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, 4 * channels)


def encode(setup: Setup, name: str, params: Any, ids: jax.Array) -> Any:
    """A text encoder's output."""
    encoder = setup.merge(name, params[name])
    table = "shared" if isinstance(encoder, T5Encoder) else "token_embedding"
    setattr(encoder, table, Lookup(getattr(encoder, table)[...]))
    return encoder(ids)


def encode_captions(
    setup: Setup, params: Any, ids: dict[str, jax.Array], t5_length: int
) -> tuple[jax.Array, jax.Array]:
    """Text states and pooled text, as `dfa2_jax.families.sd3.family.SD3.encode` puts them together."""
    first, second = (encode(setup, name, params, ids[name]) for name in ("text_encoder", "text_encoder_2"))
    t5_ids = jnp.pad(ids["text_encoder_3"], ((0, 0), (0, t5_length - ids["text_encoder_3"].shape[1])))
    t5 = encode(setup, "text_encoder_3", params, t5_ids)
    clip = jnp.concatenate([first.hidden, second.hidden], axis=-1)
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
    return jnp.concatenate([clip, t5], axis=1), jnp.concatenate([first.pooled, second.pooled], axis=-1)


def flow_loss(setup: Setup, part: Part, params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
    """Rectified flow (arXiv 2403.03206, section 3.1): velocity from image to noise."""
    picture, dropped, level, kind, even, noise = jax.random.split(key, 6)
    captions, images = draw(setup, part, data, picture)
    mean, _ = moments(setup, data["vae"], images)
    latents = patchify((mean - data["latents"][0]) / data["latents"][1])
    tokens = latents.shape[1]

    shape = (part.batch,)
    sigma = jax.nn.sigmoid(jax.random.normal(level, shape))
    shift = 3 * math.sqrt(tokens / 256)  # more tokens hide less under the same noise (equation 23)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    sigma = jnp.where(jax.random.uniform(kind, shape) < UNIFORM, jax.random.uniform(even, shape), sigma)
    eps = jax.random.normal(noise, latents.shape)
    noisy = (1 - sigma)[:, None, None] * latents + sigma[:, None, None] * eps

    empty = data["numbers"].shape[0]
    captions = jnp.where(jax.random.uniform(dropped, shape) < DROPPED, empty, captions)
    ids = {name: table[captions] for name, table in data["ids"].items()}
    text, pooled = encode_captions(setup, params, ids, part.t5_length)

    side = math.isqrt(tokens)
    positions = jnp.asarray(crop_positions(model.position_table(), side, side))
    conditions = SD3Conditions(text, pooled, positions)
    transformer = setup.merge("transformer", params["transformer"])
    velocity, _ = transformer(noisy, traced_sinusoid(1000 * sigma), conditions, Attention(setup.attention))
    return jnp.square(velocity.astype(jnp.float32) - (eps - latents)).mean()
