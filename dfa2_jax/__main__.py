"""`python -m dfa2_jax` is `dfa2`."""

import sys

from dfa2_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
