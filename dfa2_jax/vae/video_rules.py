"""The keys of a diffusers `AutoencoderKLCogVideoX`."""

from dfa2_jax.weights.rules import Rule, conv2d, conv3d, norm

PLACE = r"(?P<at>decoder\.(mid_block|up_blocks\.\d+)\.resnets\.\d+)\."
SPATIAL_NORM = r"(?P<norm>decoder\.norm_out|decoder\.(mid_block|up_blocks\.\d+)\.resnets\.\d+\.norm[12])\."

# Convolutions in time lie in a wrapper of diffusers', so their keys have one more `.conv`; the others' have not.
VIDEO_RULES = [
    Rule(r"(encoder|quant_conv|post_quant_conv)\..*", None),
    *conv3d(r"(?P<name>decoder\.conv_(in|out))\.conv", r"\g<name>"),
    *conv3d(PLACE + r"(?P<name>conv[12])\.conv", r"\g<at>.\g<name>"),
    *conv3d(PLACE + r"conv_shortcut", r"\g<at>.conv_shortcut"),
    *norm(SPATIAL_NORM + r"norm_layer", r"\g<norm>.norm_layer"),
    *conv3d(SPATIAL_NORM + r"(?P<name>conv_[yb])\.conv", r"\g<norm>.\g<name>"),
    *conv2d(r"(?P<at>decoder\.up_blocks\.\d+)\.upsamplers\.0\.conv", r"\g<at>.upsampler"),
]
