"""diffusers folders to folders of ours: `python -m convert SRC DST`, the script of this checkout.

An installed dfa2-jax has the same as `dfa2-convert` and `dfa2_jax.convert_checkpoint`.
"""

from dfa2_jax.conversion import convert_checkpoint as convert_checkpoint
from dfa2_jax.conversion import main as main
