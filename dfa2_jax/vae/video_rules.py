"""The keys of a diffusers `AutoencoderKLCogVideoX`."""

from dfa2_jax.weights.rules import conv2d, conv3d, norm

RESNET = r"(en|de)coder\.(mid_block|(up|down)_blocks\.\d+)\.resnets\.\d+"
SPATIAL_NORM = rf"(?P<norm>decoder\.norm_out|{RESNET}\.norm[12])\."

# Convolutions in time lie in a wrapper of diffusers', so their keys have one more `.conv`; the others' have not.
VIDEO_RULES = [
    *conv3d(r"(?P<name>(en|de)coder\.conv_(in|out))\.conv", r"\g<name>"),
    *conv3d(rf"(?P<name>{RESNET}\.conv[12])\.conv", r"\g<name>"),
    *conv3d(rf"(?P<name>{RESNET}\.conv_shortcut)", r"\g<name>"),
    *norm(rf"(?P<name>encoder\.norm_out|{RESNET}\.norm[12])", r"\g<name>"),
    *norm(SPATIAL_NORM + r"norm_layer", r"\g<norm>.norm_layer"),
    *conv3d(SPATIAL_NORM + r"(?P<name>conv_[yb])\.conv", r"\g<norm>.\g<name>"),
    *conv2d(r"(?P<at>(en|de)coder\.\w+_blocks\.\d+)\.(?P<to>up|down)samplers\.0\.conv", r"\g<at>.\g<to>sampler"),
]
