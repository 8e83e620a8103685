"""The contract between `api` and the backends: what is asked (`Problem`), of whom (`Backend`), and where (`Device`)."""

from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.layout import Layout

Operation = Literal["arrow", "nested", "dense"]
"""An operation of attention. A backend that has one has a method of that name."""

A = TypeVar("A", Array, jax.ShapeDtypeStruct)

NAMED = {"H100": "hopper", "H200": "hopper", "A100": "ampere"}
"""Generations by a part of JAX's name for the GPU: a GPU that is only described has no capability."""

GENERATIONS = {8: "ampere", 9: "hopper"}
"""By the first number of the compute capability."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device that programs are for."""

    name: str
    """JAX's `device_kind`: "NVIDIA H200", "cpu"."""
    capability: float | None = None
    """Compute capability of the default device; None where that is no GPU."""
    count: int = 1
    """Devices that one program may use: those of the mesh that is set, and inside `jax.shard_map` of all axes, one."""
    interpreted: bool = False
    """Kernels run in interpret mode, on any device."""

    @classmethod
    def current(cls) -> "Device":
        """The device of the mesh that is set, else the default device."""
        default, mesh = jax.devices()[0], jax.sharding.get_abstract_mesh()
        abstract = mesh.abstract_device
        name = default.device_kind if abstract is None else abstract.device_kind
        capability = getattr(default, "compute_capability", None)
        within = 1 if mesh.are_all_axes_manual else mesh.size
        return cls(
            name=name,
            capability=None if capability is None else float(capability),
            count=jax.device_count() if mesh.empty and abstract is None else within,
        )

    @property
    def is_nvidia(self) -> bool:
        return "NVIDIA" in self.name

    @property
    def no_gpu(self) -> str | None:
        """Why a kernel for NVIDIA GPUs cannot run, if so."""
        if self.is_nvidia or self.interpreted:
            return None
        return f"it runs on NVIDIA GPUs, the default device is {self.name!r}"

    @property
    def generation(self) -> str | None:
        """The generation of an NVIDIA GPU: "hopper", "ampere", or None for another one. None for every other device."""
        if not self.is_nvidia:
            return None
        of_capability = GENERATIONS.get(int(self.capability or 0))
        return next((value for part, value in NAMED.items() if part in self.name), of_capability)

    @property
    def tiles_row(self) -> str:
        """The GPU whose tiles serve this device: those of an A100 fit every GPU from compute capability 8.0 on."""
        return "h200" if self.generation == "hopper" else "a100"


@dataclass(frozen=True, kw_only=True)
class Problem(Generic[A]):
    """One call, checked: of arrays to compute, of `jax.ShapeDtypeStruct`s to ask about. Fields as in `api`."""

    operation: Operation
    q: Float[A, "B T N H"]
    k: Float[A, "B S N H"]
    v: Float[A, "B S N H"]
    layout: Layout
    half_window: Int[A, " N"] | None = None
    """Given for arrows only. No window is above `mask.EVERYTHING`."""
    cache: Float[A, "*L B T N H"] | None = None
    layer: Int[A, ""] | None = None
    """An entry of the cache, which is a stack then."""
    head_order: Int[A, " N"] | None = None
    text_length: Int[A, " B"] | None = None
    """None: all text is seen, and the kernels are those that know no other."""

    @property
    def windows(self) -> Int[A, " N"]:
        """`half_window` of an arrow problem."""
        assert self.half_window is not None, self.operation
        return self.half_window

    @property
    def order(self) -> Int[Array, " N"]:
        """The order in which heads are started."""
        return jnp.arange(self.q.shape[2], dtype=jnp.int32) if self.head_order is None else jnp.asarray(self.head_order)

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def dtype(self) -> Any:
        return self.q.dtype

    @property
    def has_every_query(self) -> bool:
        return self.q.shape[1] == self.k.shape[1]


@runtime_checkable
class Backend(Protocol):
    """Computes some of the operations: it is a `ComputesArrows`, a `ComputesNested` or a `ComputesDense`, or several.

    `lacks` is asked before every call, of every backend that may be chosen. So it imports no kernel: a kernel may need
    a library that is not installed, or another version of JAX.
    """

    @property
    def interpretable(self) -> bool:
        """Whether it takes `interpret=True`: kernels do."""
        ...

    def lacks(self, problem: Problem[Any], device: Device) -> str | None:
        """Why it cannot solve the problem on this device. None: it can."""
        ...


@runtime_checkable
class HasMerit(Backend, Protocol):
    """A backend that is the default in some places only. One without this method is it wherever it lacks nothing."""

    def merit(self, problem: Problem[Any], device: Device) -> str | None:
        """Why it is the best choice here if it lacks nothing. None: the next of `devices.PREFERENCE` is faster."""
        ...


@runtime_checkable
class ComputesArrows(Backend, Protocol):
    def arrow(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "*L B T N H"]:
        """Arrow attention. The result is like the cache, with the entry of `layer` replaced where there is one."""
        ...


@runtime_checkable
class ComputesNested(Backend, Protocol):
    def nested(
        self, problem: Problem[Array], half_windows: Int[Array, " W"], *, interpret: bool
    ) -> Float[Array, "W+1 B T N H"]:
        """Every head's output under each window, then the dense one."""
        ...


@runtime_checkable
class ComputesDense(Backend, Protocol):
    def dense(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "B T N H"]:
        """Dense attention, with gradients."""
        ...
