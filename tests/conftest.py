"""Strict JAX, no network, and the tiny diffusers folders. Imports none of our packages: the typing hook comes first."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Modules that import torch themselves cannot even be collected without it. They are named in the report's header.
HERE = Path(__file__).parent
NEED_TORCH = re.compile(r"^(import|from) (torch|diffusers|transformers|tiny)\b", re.MULTILINE)
collect_ignore = (
    [] if find_spec("torch") else [p.name for p in sorted(HERE.glob("test_*.py")) if NEED_TORCH.search(p.read_text())]
)


def pytest_report_header():
    return f"no torch: left out {', '.join(collect_ignore)}" if collect_ignore else None


def _tiny(name):
    @pytest.fixture(scope="session")
    def folder(tmp_path_factory):
        """A complete diffusers folder; `DFA2_TINY` names a folder of ready ones, for environments without torch."""
        if made := os.environ.get("DFA2_TINY"):
            return Path(made).resolve() / name
        import tiny

        return tiny.write(name, tmp_path_factory.mktemp("tiny") / name)

    return folder


tiny_sd3 = _tiny("sd3")
tiny_sd35 = _tiny("sd35")
tiny_flux_dev = _tiny("flux-dev")
tiny_flux_schnell = _tiny("flux-schnell")
