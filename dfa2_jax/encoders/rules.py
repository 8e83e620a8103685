"""The keys of transformers' CLIP, T5 and Llama text encoders."""

from dfa2_jax.weights.rules import Rule, dense, norm

# Keys of a whole CLIPModel, whose text half a CLIPTextModel is; transformers passes over the rest.
CLIP_REST = Rule(r"vision_model\..*|visual_projection\.weight|logit_scale", None)

CLIP_LAYER = r"encoder\.layers\.(?P<layer>\d+)\."
CLIP_TEXT = [
    Rule(r"embeddings\.(?P<name>token|position)_embedding\.weight", r"\g<name>_embedding"),
    Rule(r"embeddings\.position_ids", None),
    *norm(CLIP_LAYER + r"(?P<name>layer_norm[12])", r"layers.\g<name>"),
    *dense(CLIP_LAYER + r"self_attn\.(?P<name>\w+_proj)", r"layers.self_attn.\g<name>"),
    *dense(CLIP_LAYER + r"mlp\.fc1", "layers.mlp.up"),
    *dense(CLIP_LAYER + r"mlp\.fc2", "layers.mlp.down"),
    *norm(r"final_layer_norm", "final_layer_norm"),
]
# Folders saved by transformers 4 have the prefix, those saved by 5 do not, except with a projection.
CLIP_BODY = [CLIP_REST, *(Rule(r"(text_model\.)?" + rule.key, rule.target, rule.turn) for rule in CLIP_TEXT)]
CLIP = [*CLIP_BODY, Rule(r"text_projection\.weight", None)]
CLIP_PROJECTED = [*CLIP_BODY, *dense(r"text_projection", "text_projection")]

T5_LAYER = r"encoder\.block\.(?P<layer>\d+)\.layer\."
T5 = [
    # Tied: either may be alone. Where both are there, transformers' encoder reads its own.
    Rule(r"encoder\.embed_tokens\.weight", "shared"),
    Rule(r"shared\.weight", "shared", is_spare=True),
    Rule(r"decoder\..*|lm_head\.weight", None),  # of a whole T5ForConditionalGeneration
    Rule(r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", "relative_attention_bias"),
    *dense(T5_LAYER + r"0\.SelfAttention\.(?P<name>[qkvo])", r"layers.attention.\g<name>"),
    *norm(T5_LAYER + r"0\.layer_norm", "layers.attention_norm"),
    *dense(T5_LAYER + r"1\.DenseReluDense\.(?P<name>wi_[01]|wo)", r"layers.\g<name>"),
    *norm(T5_LAYER + r"1\.layer_norm", "layers.ff_norm"),
    *norm(r"encoder\.final_layer_norm", "final_layer_norm"),
]

LLAMA_LAYER = r"layers\.(?P<layer>\d+)\."
LLAMA_BODY = [
    Rule(r"embed_tokens\.weight", "embed_tokens"),
    *norm(LLAMA_LAYER + r"(?P<name>(input|post_attention)_layernorm)", r"layers.\g<name>"),
    *dense(LLAMA_LAYER + r"self_attn\.(?P<name>[qkvo]_proj)", r"layers.self_attn.\g<name>"),
    *dense(LLAMA_LAYER + r"mlp\.(?P<name>(gate|up|down)_proj)", r"layers.mlp.\g<name>"),
    Rule(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),  # older files have the frequencies
    Rule(r"norm\.weight", None),  # after the last layer, which no pipeline reads
]
# Keys of a LlamaForCausalLM have the prefix. transformers passes over its head.
LLAMA = [
    *(Rule(r"(model\.)?" + rule.key, rule.target, rule.turn) for rule in LLAMA_BODY),
    Rule(r"lm_head\.weight", None),
]
