"""Whether there is room on the devices."""

import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx


@runtime_checkable
class Places(Protocol):
    """Where weights lie: `parallel.mesh.DeviceMesh`."""

    def put_weight(self, x: Any) -> Any: ...

    def weight_bytes(self, x: Any) -> int:
        """What each device has of it."""
        ...

    @property
    def members(self) -> tuple[Any, ...]:
        """The devices."""
        ...


def free_bytes(devices: Collection[Any] = ()) -> int:
    """What the fullest of this process's devices among these can still hold; of none, the default device.

    Of a CPU's memory: what programs can get without swapping. Of a GPU whose allocator counts nothing: no limit.
    """
    if (counted := counted_bytes(devices)) is not None:
        return counted
    meminfo = Path("/proc/meminfo")  # Linux alone
    has_host_memory = _own(devices)[0].platform == "cpu" and meminfo.is_file()
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if has_host_memory else None
    return int(available[1]) * 1024 if available else sys.maxsize


def counted_bytes(devices: Collection[Any] = ()) -> int | None:
    """As `free_bytes`, of devices whose allocators count; None: none of them does, as on a CPU."""
    stats = [device.memory_stats() or {} for device in _own(devices)]
    counted = [each["bytes_limit"] - each["bytes_in_use"] for each in stats if "bytes_limit" in each]
    return min(counted, default=None)


def _own(devices: Collection[Any]) -> list[Any]:
    """This process's devices among these, or the default device."""
    default = getattr(jax.config, "jax_default_device", None)  # a device, or a platform; pyright knows no such field
    here = [device for device in devices if device.process_index == jax.process_index()]
    if isinstance(default, str) or default is None:
        default = jax.local_devices(backend=default)[0]
    return here or [default]


def check_room(name: str, model: nnx.Module, places: Places | None) -> None:
    """
    Args:
        name: of the component.
        model: with shapes in place of arrays.

    Raises:
        MemoryError: its weights do not fit; the message says what takes less.
    """
    arrays = [x.get_value() for _, x in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    devices = () if places is None else places.members
    need = sum(x.size * x.dtype.itemsize if places is None else places.weight_bytes(x) for x in arrays)
    if need > (free := free_bytes(devices)):
        smaller = 'dtype="bfloat16", "int8" or "int8_weights"'
        if name.startswith("text_encoder"):
            smaller = 'text_encoder_dtype="bfloat16" or "int8_weights", or prompt_embeds that were made elsewhere,'
        each = f" on each of {len(devices)} devices" if len(devices) > 1 else ""
        raise MemoryError(
            f"The weights of {name} take {need / 1e9:.1f} GB{each}, and {free / 1e9:.1f} GB are free. {smaller} may "
            "take less; so do several devices with shard_weights=True."
        )
