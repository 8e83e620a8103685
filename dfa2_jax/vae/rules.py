"""The keys of a diffusers `AutoencoderKL`."""

from dfa2_jax.weights.rules import conv2d, dense, norm

VAE_RESNET = r"(?P<at>(en|de)coder\.(mid_block|(up|down)_blocks\.\d+)\.resnets\.\d+)\."
VAE_ATTENTION = r"(?P<at>(en|de)coder\.mid_block)\.attentions\.0\."

RULES = [
    *conv2d(r"(?P<name>(en|de)coder\.conv_(in|out)|(post_)?quant_conv)", r"\g<name>"),
    *norm(r"(?P<name>(en|de)coder\.conv_norm_out)", r"\g<name>"),
    *norm(VAE_RESNET + r"(?P<name>norm[12])", r"\g<at>.\g<name>"),
    *conv2d(VAE_RESNET + r"(?P<name>conv[12]|conv_shortcut)", r"\g<at>.\g<name>"),
    *norm(VAE_ATTENTION + r"group_norm", r"\g<at>.attention.group_norm"),
    *dense(VAE_ATTENTION + r"(?P<name>to_[qkv])", r"\g<at>.attention.\g<name>"),
    *dense(VAE_ATTENTION + r"to_out\.0", r"\g<at>.attention.to_out"),
    *conv2d(r"(?P<at>(en|de)coder\.\w+_blocks\.\d+)\.(?P<to>up|down)samplers\.0\.conv", r"\g<at>.\g<to>sampler"),
]
