"""The autoencoders as components of a pipeline."""

from dfa2_jax.vae.hunyuan import AutoencoderKLHunyuanVideo, HunyuanAutoencoderConfig
from dfa2_jax.vae.hunyuan_rules import HUNYUAN_RULES
from dfa2_jax.vae.image import AutoencoderConfig, AutoencoderKL
from dfa2_jax.vae.rules import RULES
from dfa2_jax.vae.video import AutoencoderKLCogVideoX, VideoAutoencoderConfig
from dfa2_jax.vae.video_rules import VIDEO_RULES
from dfa2_jax.weights.spec import ComponentSpec

AUTOENCODER = ComponentSpec(
    class_name="AutoencoderKL",
    config=AutoencoderConfig.from_json,
    build=AutoencoderKL,
    rules=RULES,
    float16_becomes="float32",  # activations leave float16's range in the last decoder blocks
)

VIDEO_AUTOENCODER = ComponentSpec(
    class_name="AutoencoderKLCogVideoX",
    config=VideoAutoencoderConfig.from_json,
    build=AutoencoderKLCogVideoX,
    rules=VIDEO_RULES,
)

HUNYUAN_AUTOENCODER = ComponentSpec(
    class_name="AutoencoderKLHunyuanVideo",
    config=HunyuanAutoencoderConfig.from_json,
    build=AutoencoderKLHunyuanVideo,
    rules=HUNYUAN_RULES,
)
