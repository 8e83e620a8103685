"""The networks and tokenizers of a checkpoint, loaded when first needed, each a jitted program."""

import logging
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from dfa2_jax.encoders.tokenizers import Tokenizer, load_tokenizer
from dfa2_jax.pipeline.fit import check_ids, check_tokenizer
from dfa2_jax.weights.checkpoint import Checkpoint
from dfa2_jax.weights.dtypes import as_precision
from dfa2_jax.weights.room import Places

logger = logging.getLogger("dfa2_jax")


@partial(jax.jit, static_argnames=("graph", "method"))
def call(graph: nnx.GraphDef, params: Any, *args: Any, method: str = "__call__") -> Any:
    """A method of an NNX module as one program, shared by all modules of the same structure."""
    return getattr(nnx.merge(graph, params), method)(*args)


@partial(jax.jit, static_argnames=("graph", "method"), donate_argnames=("carried",))
def call_carrying(graph: nnx.GraphDef, params: Any, x: Any, carried: Any, *, method: str) -> Any:
    """A method that is handed what an earlier call of it returned, whose memory it may use."""
    return getattr(nnx.merge(graph, params), method)(x, carried)


class Program(NamedTuple):
    """A compiled call. returned: shapes; nbytes: on a device, beside the arguments that the call keeps."""

    returned: Any
    nbytes: int


class Component:
    """One network of a pipeline, split into its static graph and its parameters."""

    def __init__(self, module: nnx.Module):
        self.config: Any = getattr(module, "config", None)
        self.graph, self.params = nnx.split(module)

    @jax.enable_x64(False)  # a program of 32 bits, whatever the user's setting is
    def __call__(self, *args: Any, method: str = "__call__") -> Any:
        return call(self.graph, self.params, *args, method=method)

    @jax.enable_x64(False)
    def carry(self, x: Any, carried: Any, *, method: str) -> Any:
        """A method of two arguments; the second is given away."""
        return call_carrying(self.graph, self.params, x, carried, method=method)

    @jax.enable_x64(False)
    def compile(self, *args: Any, method: str, carries: bool = False) -> Program:
        """The program of a call, which then compiles nothing.

        Args:
            args: arrays, or their shapes.
            carries: for `carry`.
        """
        lowered = (call_carrying if carries else call).lower(self.graph, self.params, *args, method=method)
        memory = lowered.compile().memory_analysis()
        # What is given away lies in what is returned.
        size = 0 if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
        return Program(lowered.out_info, size)

    def read_again(
        self, checkpoint: Checkpoint, name: str, paths: Collection[str], dtype: Any, places: Places | None
    ) -> None:
        """As `Checkpoint.read_again`, of the component that has this name there."""
        variables = dict(nnx.to_flat_state(self.params))
        self.params = nnx.State({})  # it would keep what is let go
        try:
            checkpoint.read_again(name, variables, paths, dtype, places)
        finally:
            self.params = nnx.from_flat_state(variables.items())


class Networks:
    """A checkpoint's networks and tokenizers by name, each loaded once.

    Args:
        dtype: of the networks; what the transformer's blocks are quantised to is not the others'.
        text_encoder_dtype: of text encoders. None: as the others. "int8_weights" is T5's alone.
        places: by component, where its weights lie (`Checkpoint.load`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: Any,
        text_encoder_dtype: Any = None,
        places: Mapping[str, Places] | None = None,
    ):
        self.configs = checkpoint.configs
        self._checkpoint, self._dtype = checkpoint, None if as_precision(dtype) else dtype
        self._text_encoder_dtype, self._places = text_encoder_dtype, places or {}
        self._loaded: dict[str, Component] = {}
        self._tokenizers: dict[str, Tokenizer] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.configs

    def config(self, name: str) -> Any:
        return self._checkpoint.config(name)

    def __getitem__(self, name: str) -> Component:
        if name not in self._loaded:
            self._loaded[name] = Component(self._checkpoint.load(name, self._dtype_of(name), self._places.get(name)))
        return self._loaded[name]

    def read_again(self, name: str, paths: Collection[str]) -> None:
        """Reads some parameters again where the network is loaded, as the checkpoint's LoRAs now are."""
        if name in self._loaded:
            self._loaded[name].read_again(self._checkpoint, name, paths, self._dtype_of(name), self._places.get(name))

    def release_text_encoders(self) -> bool:
        """Frees their weights, says so, and returns whether there were any. The next prompt reads them again."""
        released = [name for name in self._loaded if name.startswith("text_encoder")]
        size = sum(x.nbytes for name in released for x in jax.tree.leaves(self._loaded.pop(name).params))
        if released:
            logger.warning("%s made room: %.1f GB, which the next call reads again", ", ".join(released), size / 1e9)
        return bool(released)

    def _dtype_of(self, name: str) -> Any:
        dtype = self._text_encoder_dtype
        if dtype is None or not name.startswith("text_encoder"):
            return self._dtype
        can_be = not as_precision(dtype) or self._checkpoint.spec.components[name].quantize is not None
        return dtype if can_be else self._dtype

    def encode(
        self, encoder: str, tokenizer: str, prompts: list[str], length: int | None, *args: Any, counted: bool = False
    ) -> Any:
        """States of prompts, cut or padded to `length` tokens; None if the folder has no such encoder.

        counted: for a pair of states and each prompt's number of tokens, without padding.
        """
        if encoder not in self:
            return None
        ids, lengths = self.tokenizer(tokenizer).encode_counted(prompts, length)
        check_ids(ids, self.tokenizer(tokenizer), encoder, self.config(encoder))
        states = self[encoder](ids, *args)
        return (states, lengths) if counted else states

    def tokenizer(self, name: str) -> Tokenizer:
        """
        Raises:
            CheckpointError: it cannot be read, or does not fit its encoder.
        """
        if name not in self._tokenizers:
            folder, encoder = self._checkpoint.tokenizer_folder(name), name.replace("tokenizer", "text_encoder")
            tokenizer = load_tokenizer(folder)
            check_tokenizer(folder, tokenizer, encoder, self.config(encoder))
            self._tokenizers[name] = tokenizer
        return self._tokenizers[name]

    def load_tokenizers(self) -> None:
        """All that lie there, so that a faulty one is named before weights are read."""
        for encoder in self.configs:
            name = encoder.replace("text_encoder", "tokenizer")
            if encoder != name and (self._checkpoint.folder / name).is_dir():
                self.tokenizer(name)
