"""The keys of a diffusers `AutoencoderKLHunyuanVideo`, of which the decoder is read."""

from dfa2_jax.weights.rules import Rule, conv3d, dense, norm

RESNET = r"(?P<at>decoder\.(mid_block|up_blocks\.\d+)\.resnets\.\d+)\."
ATTENTION = r"(?P<at>decoder\.mid_block)\.attentions\.0\."

# Convolutions over frames lie in a wrapper of diffusers', so their keys have one more `.conv`.
HUNYUAN_RULES = [
    Rule(r"encoder\..*|quant_conv\..*", None),  # no pipeline encodes a video
    *conv3d(r"post_quant_conv", "post_quant_conv"),
    *conv3d(r"(?P<name>decoder\.conv_(in|out))\.conv", r"\g<name>"),
    *norm(r"(?P<name>decoder\.conv_norm_out)", r"\g<name>"),
    *norm(RESNET + r"(?P<name>norm[12])", r"\g<at>.\g<name>"),
    *conv3d(RESNET + r"(?P<name>conv[12]|conv_shortcut)\.conv", r"\g<at>.\g<name>"),
    *norm(ATTENTION + r"group_norm", r"\g<at>.attention.group_norm"),
    *dense(ATTENTION + r"(?P<name>to_[qkv])", r"\g<at>.attention.\g<name>"),
    *dense(ATTENTION + r"to_out\.0", r"\g<at>.attention.to_out"),
    *conv3d(r"(?P<at>decoder\.up_blocks\.\d+)\.upsamplers\.0\.conv\.conv", r"\g<at>.upsampler"),
]
