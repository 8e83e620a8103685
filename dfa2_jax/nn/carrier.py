"""Values that travel through `jax.jit`, with shapes that are checked."""

from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform

from jax.tree_util import GetAttrKey, register_pytree_with_keys

Class = TypeVar("Class", bound=type)


@dataclass_transform(frozen_default=True)
def carrier(cls: Class) -> Class:
    """A frozen dataclass that is a pytree: checked where it is made, not where JAX puts placeholders into it.

    jaxtyping's hook checks dataclasses, and no NamedTuples. `jax.tree_util.register_dataclass` would call `__init__`
    whenever JAX rebuilds a value: the check would refuse `jax.eval_shape`, `jax.vmap` and the inputs of a scan.
    """
    made = dataclass(frozen=True)(cls)
    names = [field.name for field in fields(made)]

    def flatten(value: Any) -> tuple[list[tuple[Any, Any]], None]:
        return [(GetAttrKey(name), getattr(value, name)) for name in names], None

    def unflatten(_: None, leaves: Any) -> Any:
        value = object.__new__(made)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(value, name, leaf)
        return value

    register_pytree_with_keys(made, flatten, unflatten)
    return made
