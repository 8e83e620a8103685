"""Text encoders as components of a pipeline."""

from functools import partial

from dfa2_jax.encoders import rules
from dfa2_jax.encoders.clip import CLIPTextConfig, CLIPTextModel
from dfa2_jax.encoders.llama import LlamaConfig, LlamaEncoder, place_of
from dfa2_jax.encoders.t5 import T5Config, T5Encoder
from dfa2_jax.nn.quantize import quantize_linears
from dfa2_jax.weights.spec import ComponentSpec

CLIP = ComponentSpec(
    class_name="CLIPTextModel",
    library="transformers",
    config=CLIPTextConfig.from_json,
    build=partial(CLIPTextModel, projection=False),
    rules=rules.CLIP,
)

CLIP_PROJECTED = ComponentSpec(
    class_name="CLIPTextModelWithProjection",
    library="transformers",
    config=CLIPTextConfig.from_json,
    build=partial(CLIPTextModel, projection=True),
    rules=rules.CLIP_PROJECTED,
)

T5 = ComponentSpec(
    class_name="T5EncoderModel",
    library="transformers",
    config=T5Config.from_json,
    build=T5Encoder,
    rules=rules.T5,
    quantize=quantize_linears,
    float16_becomes="bfloat16",  # T5-XXL's activations leave float16's range in its MLPs
)

LEFT_OUT = 2
"""Last layers of its Llama that HunyuanVideo does not read: it takes `hidden_states[-3]`."""

LLAMA = ComponentSpec(
    class_name="LlamaModel",
    library="transformers",
    config=LlamaConfig.from_json,
    build=partial(LlamaEncoder, left_out=LEFT_OUT),
    rules=rules.LLAMA,
    quantize=quantize_linears,
    place=partial(place_of, left_out=LEFT_OUT),
)
