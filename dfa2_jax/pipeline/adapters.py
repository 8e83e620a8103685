"""LoRAs upon a pipeline's weights: loaded, scaled and taken off, while every compiled program stays."""

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from dfa2_jax.io.names import suggests_names
from dfa2_jax.pipeline.loaded import Loaded
from dfa2_jax.weights.adapters import open_adapter
from dfa2_jax.weights.lora import Adapter

logger = logging.getLogger("dfa2_jax")


class Adaptable(Loaded):
    """A `Loaded` that LoRAs change.

    Weights are arguments of programs, so nothing compiles anew. What LoRAs change is read again from the folder. So
    the sum is never of earlier sums, and without LoRAs the weights are the folder's again, bit for bit.
    """

    @property
    def loras(self) -> dict[str, dict[str, Any]]:
        """By name: the file, its scale and its sha256."""
        return {adapter.name: adapter.content() for adapter in self.checkpoint.adapters}

    @suggests_names
    def load_lora(self, file: str | PathLike[str], scale: float = 1.0, name: str | None = None) -> str:
        """Add a LoRA to the weights of the transformer and the text encoders, beside those that are there.

        Blocks that are quantised are quantised anew, of the sum.

        Args:
            file: a .safetensors file in the spelling of diffusers or PEFT, kohya, ComfyUI, or XLabs (FLUX.1).
            scale: of what it adds; any finite number.
            name: for `unload_lora`; None: the file's, without its suffix. The LoRA that has this name is replaced,
                which is how a scale is changed.

        Returns:
            The name.

        Raises:
            CheckpointError: the file is no LoRA for this model, with what it is; the weights are as they were.
            ValueError: the scale is no finite number, or another file's LoRA has the name that no argument gave.
        """
        adapter = open_adapter(self.checkpoint, file, scale, name)
        kept = [other for other in self.checkpoint.adapters if other.name != adapter.name]
        same = [other for other in self.checkpoint.adapters if other.name == adapter.name]
        if name is None and same and same[0].file.absolute() != Path(file).absolute():
            raise ValueError(f"{file} would have the name {adapter.name!r} of {same[0].file}: pass name=.")
        if self.precision is not None:
            logger.warning("%s is added before blocks are quantised to %s", file, self.precision)
        self._adapt([*kept, adapter])
        return adapter.name

    @suggests_names
    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA off.

        Args:
            name: None: all of them.

        Raises:
            ValueError: no LoRA has the name.
        """
        names = [adapter.name for adapter in self.checkpoint.adapters]
        if name is not None and name not in names:
            raise ValueError(f"there is no LoRA {name!r:.100}; there are {names}.")
        self._adapt([adapter for adapter in self.checkpoint.adapters if name is not None and adapter.name != name])

    def _adapt(self, adapters: Sequence[Adapter]) -> None:
        """Reads what the present LoRAs or these change; where that fails, the present ones stay."""
        checkpoint, before = self.checkpoint, self.checkpoint.adapters
        changed: dict[str, set[str]] = {}
        same = {id(adapter) for adapter in before} & {id(adapter) for adapter in adapters}
        for adapter in [adapter for adapter in (*before, *adapters) if id(adapter) not in same]:
            for component, pieces in adapter.pieces.items():
                changed.setdefault(component, set()).update(piece.path for piece in pieces)
        try:
            checkpoint.adapters = tuple(adapters)
            self._read_again(changed)
        except BaseException:
            checkpoint.adapters = before
            self._read_again(changed)
            raise
        self.fingerprint, self.folder_digest = checkpoint.adapted_fingerprint, checkpoint.adapted_folder_digest

    def _read_again(self, changed: dict[str, set[str]]) -> None:
        for name, paths in changed.items():
            if name == "transformer":
                places = self._mesh(self.devices)
                self.transformer.read_again(self.checkpoint, name, paths, self.requested_dtype, places)
            else:
                self.networks.read_again(name, paths)
