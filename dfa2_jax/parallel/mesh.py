"""Devices as a mesh of rows and tokens: who computes what, and who keeps what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from pallas_kernels import Layout

ROWS, TOKENS = "rows", "tokens"

WEIGHTS = P(None, (ROWS, TOKENS))
"""Where a stack's matrices lie, [L, D, E], if devices share them: by rows, so that a gather transposes nothing."""

MEMORY = P(None, ROWS, TOKENS)
"""Where memory lies, [L, B, T, N, H]: outputs are where their tokens are, so any device may have any head."""


@dataclass(frozen=True)
class DeviceMesh:
    """Devices that make one batch of images: `rows` shares of the transformer's batch, `tokens` shares of the sequence.

    The batch holds images and both sides of guidance, which never meet. The sequence meets in attention, where devices
    exchange tokens for heads (`parallel.ulysses`). So rows are as many as the batch allows. Latents are whole on every
    device, and so are inputs.

    Attributes:
        shard_weights: devices share the blocks' matrices, too, and gather each where it is read. Else all are whole.
    """

    devices: Mesh
    shard_weights: bool = False

    @classmethod
    def of(cls, devices: Sequence[Any], batch: int, shard_weights: bool = False) -> "DeviceMesh":
        rows = gcd(batch, len(devices))
        return cls(Mesh(np.array(devices).reshape(rows, -1), (ROWS, TOKENS)), shard_weights)

    @property
    def rows(self) -> int:
        return self.devices.shape[ROWS]

    @property
    def tokens(self) -> int:
        return self.devices.shape[TOKENS]

    @property
    def whole(self) -> NamedSharding:
        """Every device holds the array."""
        return NamedSharding(self.devices, P())

    @property
    def memory(self) -> NamedSharding:
        return NamedSharding(self.devices, MEMORY)

    def put(self, x: Any) -> Any:
        """A pytree that every device holds."""
        return jax.tree.map(lambda leaf: _put(leaf, self.whole), x)

    def put_weight(self, x: Any) -> Any:
        return _put(x, NamedSharding(self.devices, self.of_weight(x)))

    def adopted(self, x: jax.Array) -> jax.Array:
        """A weight that lies on these devices, as an array of this mesh; nothing is copied.

        A pipeline's weights are loaded for a mesh of their own, and cuDNN's attention refuses a program of two.
        """
        by_device = {shard.device: shard.data for shard in x.addressable_shards}
        own = [by_device[device] for device in self.members if device in by_device]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(self.devices, self.of_weight(x)), own)

    def put_image(self, x: Float[Array | np.ndarray, "*dims h w C"]) -> jax.Array:
        return _put(x, NamedSharding(self.devices, self.of_image(x.shape)))

    def of_image(self, shape: tuple[int, ...]) -> P:
        """Where images [..., h, w, C] lie. Devices share lines of pixels, if they divide them; else all have all."""
        return P(*[None] * (len(shape) - 3), (ROWS, TOKENS)) if shape[-3] % self.devices.size == 0 else P()

    @property
    def members(self) -> tuple[Any, ...]:
        return tuple(self.devices.devices.flat)

    def weight_bytes(self, x: Any) -> int:
        """What each device has of an array of the transformer."""
        return x.size * x.dtype.itemsize // (self.devices.size if self.of_weight(x) == WEIGHTS else 1)

    def of_weight(self, x: Any) -> P:
        """Where an array of the transformer lies. Those that devices do not divide stay whole, as small ones do."""
        is_shared = self.shard_weights and x.ndim == 3 and x.shape[1] % self.devices.size == 0
        return WEIGHTS if is_shared else P()

    def _readable(self, params: Any) -> Any:
        """What devices share is gathered where a model reads it."""

        def readable(x: nnx.Variable) -> nnx.Variable:
            return x.copy(on_get_value=_gathered) if self.of_weight(x.get_value()) == WEIGHTS else x

        return nnx.from_flat_state((path, readable(x)) for path, x in nnx.to_flat_state(params))

    def share(self, layout: Layout) -> Layout:
        """The tokens of one device: text and visual ones in equal shares, the last of them padded."""
        num_text, num_visual = (-(-count // self.tokens) for count in (layout.num_text, layout.num_visual))
        return Layout(num_text, num_visual, layout.text_first)

    def padded_length(self, layout: Layout) -> int:
        """Tokens of all devices' shares."""
        return self.tokens * self.share(layout).length

    def own_rows(self, x: Shaped[Array, "_ ..."]) -> Shaped[Array, "_ ..."]:
        return _own(x, 0, ROWS, self.rows)

    def own_tokens(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        return _own(x, axis, TOKENS, self.tokens)

    def run(
        self, loop: Callable[..., Any], params: Any, state: Any, *data: Any, returns: Callable[[Any], Any] = lambda x: x
    ) -> Any:
        """`loop(params, state, *data)` on every device. All is whole there but memory and shared weights.

        Args:
            returns: where lies what the loop returns, of where the state lies; without it, that.
        """
        if self.shard_weights:
            params = self._readable(params)
        of_params = jax.tree.map(self.of_weight, params)
        of_state = jax.tree_util.tree_map_with_path(lambda path, _: MEMORY if path[0].name == "memory" else P(), state)
        specs = of_params, of_state, *(P() for _ in data)
        mapped = jax.shard_map(loop, mesh=self.devices, in_specs=specs, out_specs=returns(of_state), check_vma=False)
        return mapped(params, state, *data)


def _gathered(_: Any, x: Shaped[Array, "own E"]) -> Shaped[Array, "D E"]:
    """A layer's matrix, of all devices' rows."""
    return lax.all_gather(x, (ROWS, TOKENS), axis=0, tiled=True)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on devices of all processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _own(x: Array, axis: int, name: str, parts: int) -> Array:
    """This device's share of an axis, which is padded with zeros to as many equal ones."""
    if parts == 1:
        return x
    size = -(-x.shape[axis] // parts)
    padding = [(0, size * parts - x.shape[axis] if at == axis else 0) for at in range(x.ndim)]
    return lax.dynamic_slice_in_dim(jnp.pad(x, padding), lax.axis_index(name) * size, size, axis)


def devices_named(devices: int | str | Sequence[Any] | None) -> tuple[Any, ...]:
    """The devices that an argument asks for; none for None.

    Args:
        devices: their number, "all", or JAX's own.

    Raises:
        ValueError: there are no such devices, or one twice; the message shows those that are there. Or some are left
            out where several processes run, each of which must have its own among them.
    """
    if devices is None:
        return ()
    there = jax.devices()
    if devices == "all":
        return tuple(there)
    if jax.process_count() > 1:
        raise ValueError(f'{devices=!r:.200} with {jax.process_count()} processes must be "all": {there}.')
    if isinstance(devices, int) and not isinstance(devices, bool):
        if not 1 <= devices <= len(there):
            raise ValueError(
                f"{devices=}, but {len(there)} are here: {there}. CUDA_VISIBLE_DEVICES says which ones JAX sees."
            )
        return tuple(there[:devices])
    given = tuple(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else ()
    if not given or len(set(given)) < len(given) or any(device not in there for device in given):
        raise ValueError(f'{devices=!r:.200} must be a number, "all" or different ones of jax.devices()={there}.')
    return given
