"""Tiny but complete SD3, SD3.5, FLUX.1, CogVideoX and HunyuanVideo folders, built offline with diffusers.

    python tests/tiny.py DIR

Every parameter is drawn anew: initial values (zero biases, equal norms, zero-initialised layers) hide errors.
"""

import json
import string
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizer_cases import LLAMA_SPECIAL, llama_backend
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CAPTIONS = [
    f"a {size} {colour} {shape} on the {place} of a blue background"
    for size, colour, shape, place in product(
        ("small", "large"),
        ("red", "green", "blue", "yellow", "purple", "white"),
        ("circle", "square", "triangle", "star", "ring", "cross"),
        ("left", "right", "top", "bottom", "centre"),
    )
]


def redraw(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Normal parameters, scaled by fan-in so that activations stay of order one; norm scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_scale = "norm" in name and name.endswith("weight")
                parameter.copy_(noise * 0.2 + (1.0 if is_scale else 0.0))
            elif "embedding" in name or "shared" in name or "relative_attention_bias" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.eval()


@cache
def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """Byte-level BPE of the captions in CLIP's order: bytes, bytes at a word's end, merges, start, end (largest id)."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"\p{L}+"), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CAPTIONS, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    order = ["!"] + alphabet + [byte + "</w>" for byte in alphabet] + [a + b for a, b in merges]  # bigG pads with id 0
    order = list(dict.fromkeys(order)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(order)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


@cache
def t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces of the captions; <pad> 0, </s> 1, <unk> 2."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list(string.ascii_lowercase),
        show_progress=False,
    )
    backend.train_from_iterator(CAPTIONS, trainer)
    pieces = [tuple(piece) for piece in json.loads(backend.to_str())["model"]["vocab"]]
    return T5TokenizerFast(vocab=pieces, model_max_length=512, extra_ids=0)


def clip_encoder(width: int, heads: int, activation: str, seed: int, *, projection: bool) -> torch.nn.Module:
    size = len(clip_tokenizer("!"))
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=activation,
        max_position_embeddings=77,
        bos_token_id=size - 2,
        eos_token_id=2,  # the published value: the pooled state is taken at the largest id
        pad_token_id=size - 1,
    )
    return redraw((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def t5_encoder(seed: int) -> torch.nn.Module:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=96,
        d_kv=16,
        d_ff=192,
        num_layers=2,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return redraw(T5EncoderModel(config), seed)


def autoencoder(levels: int, scaling_factor: float, shift_factor: float, seed: int) -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(16, 16, 32, 32)[-levels:],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    redraw(model, seed)
    with torch.no_grad():
        model.decoder.conv_out.weight *= 0.4  # else most pixels are clipped to black or white
    return model


def sd3_pipeline(*, levels: int, **transformer: Any) -> StableDiffusion3Pipeline:
    sizes = {
        "sample_size": 16,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 96,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 80,
        "pos_embed_max_size": 24,
    }
    return StableDiffusion3Pipeline(
        transformer=redraw(SD3Transformer2DModel(**sizes, **transformer), 0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(levels, 1.5305, 0.0609, 1),
        text_encoder=clip_encoder(32, 2, "quick_gelu", 2, projection=True),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        text_encoder_2=clip_encoder(48, 3, "gelu", 3, projection=True),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5_encoder(4),
        tokenizer_3=t5_tokenizer(),
    )


def flux_pipeline(scheduler: dict[str, Any], *, guidance_embeds: bool) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=96,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=redraw(transformer, 0),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=autoencoder(4, 0.3611, 0.1159, 1),
        text_encoder=clip_encoder(32, 2, "quick_gelu", 2, projection=False),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        text_encoder_2=t5_encoder(4),
        tokenizer_2=t5_tokenizer(),
    )


def cogvideox_pipeline(snr_shift_scale: float, scaling_factor: float, **transformer: Any) -> CogVideoXPipeline:
    sizes = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "time_embed_dim": 24,
        "text_embed_dim": 96,
        "max_text_seq_length": 14,
        "sample_height": 6,
        "sample_width": 10,
        "sample_frames": 9,
    }
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
    )
    redraw(vae, 1)
    with torch.no_grad():
        vae.decoder.conv_out.conv.weight *= 0.4
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift_scale,
        clip_sample=False,
    )
    return CogVideoXPipeline(
        transformer=redraw(CogVideoXTransformer3DModel(**sizes, **transformer), 0),
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5_encoder(4),
        tokenizer=t5_tokenizer(),
    )


@cache
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As tokenizer.json says: transformers reads one of a `LlamaTokenizerFast` otherwise."""
    backend = llama_backend([DEFAULT_PROMPT_TEMPLATE["template"], *CAPTIONS])
    names = {"bos_token": LLAMA_SPECIAL[0], "eos_token": "<|end_of_text|>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **names)


def llama_encoder(seed: int) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=len(llama_tokenizer()),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
    )
    return redraw(LlamaModel(config), seed)


def hunyuanvideo_pipeline() -> HunyuanVideoPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        text_embed_dim=48,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4
    )
    redraw(vae, 1)
    with torch.no_grad():
        vae.decoder.conv_out.conv.weight *= 0.4
    return HunyuanVideoPipeline(
        transformer=redraw(transformer, 0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=vae,
        text_encoder=llama_encoder(4),
        tokenizer=llama_tokenizer(),
        text_encoder_2=clip_encoder(32, 2, "quick_gelu", 2, projection=False),
        tokenizer_2=clip_tokenizer("<|endoftext|>"),
    )


ROTARY = {"use_rotary_positional_embeddings": True}

DYNAMIC_SHIFT = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd3": lambda: sd3_pipeline(levels=3),
    "sd35": lambda: sd3_pipeline(levels=4, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "flux-dev": lambda: flux_pipeline(DYNAMIC_SHIFT, guidance_embeds=True),
    "flux-schnell": lambda: flux_pipeline({"shift": 1.0}, guidance_embeds=False),
    "cogvideox-2b": lambda: cogvideox_pipeline(3.0, 1.15258426),
    "cogvideox-5b": lambda: cogvideox_pipeline(1.0, 0.7, **ROTARY),
    "cogvideox-15": lambda: cogvideox_pipeline(1.0, 0.7, **ROTARY, patch_size_t=2, patch_bias=False),
    "hunyuanvideo": hunyuanvideo_pipeline,
}


def write(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """Write pipeline `name` to `folder`; `save` goes to `save_pretrained` (variant="fp16", max_shard_size="1MB")."""
    pipeline = PIPELINES[name]()
    if dtype != torch.float32:  # diffusers warns of any cast
        pipeline.to(dtype)
    pipeline.save_pretrained(folder, **save)
    return folder


if __name__ == "__main__":
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for pipeline in PIPELINES:
        print(write(pipeline, Path(sys.argv[1]) / pipeline))
