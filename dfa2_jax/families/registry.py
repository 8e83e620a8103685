"""The families that a folder can hold, by the pipeline class that its model_index.json names."""

from os import PathLike
from typing import Any

from dfa2_jax.families.base import Family
from dfa2_jax.families.cogvideox.family import CogVideoX
from dfa2_jax.families.flux.family import Flux, FluxFill, FluxKontext
from dfa2_jax.families.hunyuanvideo.family import HunyuanVideo
from dfa2_jax.families.sd3.family import SD3
from dfa2_jax.weights.checkpoint import Checkpoint
from dfa2_jax.weights.open import open_folder
from dfa2_jax.weights.spec import ComponentSpec

FAMILIES: dict[str, Any] = {}
"""Classes that make a `families.base.Family`."""

MADE = {"tokens", "latent_channels", "defaults"}
"""Members of a family that may depend on its config: instances have them."""


def register(family: type[Any]) -> None:
    """Make a family known: `Pipeline.from_pretrained` and `dfa2-convert` open its folders from now on.

    Raises:
        TypeError: the class lacks members of `families.base.Family`.
    """
    members = {name for name in (*Family.__annotations__, *vars(Family)) if not name.startswith("_")}
    if lacking := sorted(members - MADE - {*dir(family)}):
        raise TypeError(f"{family.__name__} lacks {lacking} of families.base.Family: define them.")
    FAMILIES[family.pipeline_class] = family


for known in (SD3, Flux, FluxFill, FluxKontext, CogVideoX, HunyuanVideo):
    register(known)


def networks() -> dict[str, ComponentSpec]:
    """Every network of every family, by the class name that a folder gives it; of two, that of the earlier family."""
    specs = [spec for family in FAMILIES.values() for spec in family.components.values()]
    return {spec.class_name: spec for spec in reversed(specs)}


def open_checkpoint(folder: str | PathLike[str], *, verify: bool = True) -> Checkpoint:
    """A folder of one of these families (`weights.open.open_folder`)."""
    return open_folder(folder, FAMILIES, verify=verify)
