"""Whether the networks and tokenizers of a folder fit each other: seen in their configs, before any weight is read."""

from pathlib import Path
from typing import Any

import numpy as np

from dfa2_jax.encoders.llama import LlamaConfig
from dfa2_jax.encoders.specs import CLIP, CLIP_PROJECTED
from dfa2_jax.encoders.t5 import T5Config
from dfa2_jax.encoders.tokenizers import Tokenizer
from dfa2_jax.io.errors import CheckpointError, raise_faults
from dfa2_jax.vae.hunyuan import HunyuanAutoencoderConfig
from dfa2_jax.vae.image import AutoencoderConfig
from dfa2_jax.vae.video import VideoAutoencoderConfig
from dfa2_jax.weights.checkpoint import Checkpoint

VIDEO = VideoAutoencoderConfig, HunyuanAutoencoderConfig
"""Configs of autoencoders of videos."""


def check_fit(checkpoint: Checkpoint) -> None:
    """
    Raises:
        CheckpointError: names components of another width than the transformer's, and both widths.
    """
    transformer, components = checkpoint.config("transformer"), checkpoint.spec.components
    configs = {name: checkpoint.config(name) for name in components if name in checkpoint.classes}
    faults = []
    for name, config in configs.items():
        if isinstance(config, (AutoencoderConfig, *VIDEO)):
            channels = transformer.token_channels // transformer.patch_size**2
            if isinstance(config, VIDEO):
                channels, ratio = transformer.in_channels, "temporal_compression_ratio"
                faults += differ(f"{name}: {ratio}", getattr(config, ratio), ratio, getattr(transformer, ratio))
            faults += differ(f"{name}: latent_channels", config.latent_channels, "latent channels", channels)
            if config.out_channels != 3:
                faults.append(f"{name}: out_channels={config.out_channels}, but images have 3")
        if isinstance(config, (T5Config, LlamaConfig)):
            field = "d_model" if isinstance(config, T5Config) else "hidden_size"
            width = getattr(config, field)
            faults += differ(f"{name}: {field}", width, "joint_attention_dim", transformer.joint_attention_dim)
    wanted = [name for name, spec in components.items() if spec in (CLIP, CLIP_PROJECTED)]
    clips = {name: configs[name] for name in wanted if name in configs}
    if clips and len(clips) == len(wanted):
        is_projected = all(components[name] is CLIP_PROJECTED for name in clips)
        field = "projection_dim" if is_projected else "hidden_size"
        widths = [getattr(config, field) for config in clips.values()]
        ours = f"{' and '.join(clips)}: {field}" + (f" {' + '.join(map(str, widths))}" if len(widths) > 1 else "")
        faults += differ(ours, sum(widths), "pooled_projection_dim", transformer.pooled_projection_dim)
        side_by_side = sum(config.hidden_size for config in clips.values())
        if is_projected and side_by_side > transformer.joint_attention_dim:
            ours = f"{' and '.join(clips)}: hidden_size adds up to {side_by_side}"
            faults.append(f"{ours}, more than the transformer's joint_attention_dim={transformer.joint_attention_dim}")
    raise_faults(f"The networks in {checkpoint.folder} are not of one model: get the folder again", {"": faults})


def differ(ours: str, size: int, theirs: str, wanted: int) -> list[str]:
    return [] if size == wanted else [f"{ours}={size}, but the transformer's {theirs}={wanted}"]


def check_tokenizer(folder: Path, tokenizer: Tokenizer, encoder: str, config: Any) -> None:
    """Raises CheckpointError where the encoder has fewer embeddings or positions than the tokenizer counts on."""
    size = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    if size > config.vocab_size:
        raise CheckpointError(
            f"{folder} has {size} tokens, but {encoder} has vocab_size={config.vocab_size}: they are not of one model."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokenizer.model_max_length > positions:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} has model_max_length={tokenizer.model_max_length:.6g}, but {encoder} "
            f"has max_position_embeddings={positions}: write {positions} there."
        )


def check_ids(ids: np.ndarray, tokenizer: Tokenizer, encoder: str, config: Any) -> None:
    """Raises CheckpointError for a token that has no embedding, where a gather would take another token's."""
    if (largest := int(ids.max(initial=0))) >= config.vocab_size:
        token = tokenizer.backend.id_to_token(largest)
        raise CheckpointError(
            f"{tokenizer.name} makes id {largest} of {token!r:.100}, but {encoder} has vocab_size={config.vocab_size}: "
            "the token's embedding is not in this folder."
        )
