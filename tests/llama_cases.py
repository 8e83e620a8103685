"""Folders of a Llama alone, and what is loaded from them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from flax import nnx

from dfa2_jax.encoders.llama import LlamaEncoder
from dfa2_jax.encoders.specs import LLAMA
from dfa2_jax.weights.checkpoint import Checkpoint
from dfa2_jax.weights.open import open_folder
from dfa2_jax.weights.spec import ComponentSpec

UNREAD = ComponentSpec(class_name="Unread", config=lambda json: SimpleNamespace(**json), build=nnx.Module, rules=[])
SPEC = SimpleNamespace(
    pipeline_class="HunyuanVideoPipeline",
    scheduler_classes=("Unread",),
    components={"transformer": UNREAD, "text_encoder": LLAMA},
    check_scheduler=lambda config: None,
)


def checkpoint_of(model: transformers.PreTrainedModel, folder: Path, **save: Any) -> Checkpoint:
    """A pipeline's folder whose text encoder is the model; its other parts are configs alone."""
    model.save_pretrained(folder / "text_encoder", **save)
    index: dict[str, Any] = {"_class_name": SPEC.pipeline_class, "text_encoder": ["transformers", "LlamaModel"]}
    for name, file in (("transformer", "config.json"), ("scheduler", "scheduler_config.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps({"joint_attention_dim": model.config.hidden_size}))
        index[name] = ["diffusers", "Unread"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return open_again(folder)


def open_again(folder: Path) -> Checkpoint:
    return open_folder(folder, {SPEC.pipeline_class: SPEC})


def encoder_of(model: transformers.PreTrainedModel, folder: Path, dtype: str = "float32") -> LlamaEncoder:
    encoder = checkpoint_of(model, folder).load("text_encoder", dtype)
    assert isinstance(encoder, LlamaEncoder)
    return encoder
