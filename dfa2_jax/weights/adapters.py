"""A LoRA's file for one checkpoint: which parameters of which component each of its modules changes."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from flax import nnx

from dfa2_jax.io.digest import file_sha256
from dfa2_jax.io.errors import CheckpointError, raise_faults
from dfa2_jax.weights.checkpoint import Checkpoint
from dfa2_jax.weights.lora import Adapter, LowRank, model_named, read_modules
from dfa2_jax.weights.rules import Piece, Rule, pieces_of, shape_fault
from dfa2_jax.weights.spec import ComponentSpec, PipelineSpec

OWN = {
    "FluxPipeline": "FLUX.1",
    "FluxFillPipeline": "FLUX.1",
    "FluxKontextPipeline": "FLUX.1",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "CogVideoXPipeline": "CogVideoX",
    "HunyuanVideoPipeline": "HunyuanVideo",
}
"""What `lora.MODELS` calls the model of a pipeline."""

CLIPS = ("CLIPTextModel", "CLIPTextModelWithProjection")

TEXT_PREFIXES = {
    "lora_te_": (CLIPS, 0),
    "lora_te1_": (CLIPS, 0),
    "lora_te2_": (CLIPS, 1),
    "lora_te3_": (("T5EncoderModel",), 0),
    "text_encoders.clip_l.transformer.": (CLIPS, 0),
    "text_encoders.clip_g.transformer.": (CLIPS, 1),
    "text_encoders.t5xxl.transformer.": (("T5EncoderModel",), 0),
}
"""kohya's and ComfyUI's prefixes: the classes of the text encoder, and its number among the pipeline's of these."""

TRANSFORMER_PREFIXES = (
    *("transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model."),
    *("lora_unet_", "lora_transformer_"),
)


def open_adapter(
    checkpoint: Checkpoint, file: str | PathLike[str], scale: float = 1.0, name: str | None = None
) -> Adapter:
    """A LoRA for this checkpoint, all of it checked. The checkpoint stays as it is.

    Args:
        scale: of what it adds.
        name: None: the file's, without its suffix.

    Raises:
        CheckpointError: the file is no LoRA that can be read, has unknown keys or other shapes, or is for another
            model. Or it changes weights that are stored in 8 bits.
        ValueError: the scale is no finite number.
    """
    file = Path(file)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"{scale=!r:.100} of {file} must be a finite number.")
    modules, pieces, shapes = read_modules(file), {}, {}
    faults: dict[str, list[str]] = {"unknown keys": [], "wrong shapes": [], "changes of what the folder lacks": []}
    for module, change in modules.items():
        component, module_name = component_of(checkpoint.spec, module)
        if component in checkpoint.spec.components and component not in checkpoint.classes:
            faults["changes of what the folder lacks"].append(f"{module} (of {component})")
            continue
        if component == "transformer" and checkpoint.precision is not None:
            raise CheckpointError(
                f"{file} changes weights that {checkpoint.folder} holds in {checkpoint.precision}. Convert its source "
                f"again with dfa2-convert --lora, or load the source with dtype={checkpoint.precision!r}."
            )
        own = pieces_in(checkpoint, component, module_name, change)
        if component not in shapes and own:
            shapes[component] = shapes_of(checkpoint, component)
        if own is None or any(expected_shape(piece, shapes[component]) is None for piece in own):
            faults["unknown keys"].append(change.key)
            continue
        shape_faults = [shape_fault(piece, expected_shape(piece, shapes[component]) or ()) for piece in own]
        faults["wrong shapes"] += [fault for fault in shape_faults if fault]
        pieces.setdefault(component, []).extend(own)
        for kind, fault in change.faults().items():
            faults.setdefault(kind, []).append(fault)
    headline = f"{file} does not fit {checkpoint.folder}"
    model = model_named([*modules])
    if model is not None and model != OWN.get(checkpoint.pipeline_class):
        headline = f"{file} is a LoRA for {model}, and {checkpoint.folder} is a {checkpoint.pipeline_class}"
    raise_faults(headline, faults | {"parameters that several keys change": repeated(pieces)})
    return Adapter(name or file.stem, file, float(scale), file_sha256(file), pieces)


def component_of(spec: PipelineSpec, module: str) -> tuple[str, str]:
    """The component that a module is of, and the module's name in it; without a prefix it is the transformer's."""
    for prefix, (classes, number) in TEXT_PREFIXES.items():
        if module.startswith(prefix):
            names = [name for name, component in spec.components.items() if component.class_name in classes]
            return names[number] if number < len(names) else prefix, module.removeprefix(prefix)
    for prefix in TRANSFORMER_PREFIXES:
        if module.startswith(prefix):
            return "transformer", module.removeprefix(prefix)
    first, _, rest = module.partition(".")
    return (first, rest) if first.startswith("text_encoder") else ("transformer", module)


def pieces_in(checkpoint: Checkpoint, component: str, module: str, change: LowRank) -> list[Piece] | None:
    """What a module changes, by the first spelling that has its name; None: none has it."""
    spec = checkpoint.spec.components.get(component)
    if spec is None:
        return None
    place = spec.place(checkpoint.config(component))  # a name of one word is the same with dots and underscores
    for rules in spellings(spec, is_underscored="." not in module):
        separator = "." if "." in module else "_"
        try:
            pieces = pieces_of(f"{module}{separator}weight", change, rules, place)
        except ValueError:  # a block beyond the last
            return None
        if pieces is not None:
            return pieces
    return None


def spellings(spec: ComponentSpec, *, is_underscored: bool) -> Iterator[Sequence[Rule]]:
    """Tables of the names that trainers have for a component's weights.

    is_underscored: for kohya's names, which have underscores in place of dots.
    """
    for rules in (spec.rules, spec.lora_rules):
        yield [replace(rule, key=rule.key.replace(r"\.", "_")) for rule in rules] if is_underscored else rules


def shapes_of(checkpoint: Checkpoint, component: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the component's parameters by dotted path."""
    state = nnx.to_flat_state(nnx.state(checkpoint.abstract(component, "float32")))
    return {".".join(map(str, path)): tuple(variable.shape) for path, variable in state}


def expected_shape(piece: Piece, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """What fills the place; None: the model has no such place."""
    shape = shapes.get(piece.path)
    if shape is None or piece.place is None:
        return shape
    return shape[1:] if piece.place < shape[0] else None


def repeated(pieces: Mapping[str, Sequence[Piece]]) -> list[str]:
    """Places that more than one module fills: the file says the same in two spellings."""
    counts = Counter((name, piece.path, piece.place) for name, some in pieces.items() for piece in some)
    return [f"{name}.{path}" for (name, path, _), count in counts.items() if count > 1]
