"""Strict JAX, no network, and the tiny diffusers folders. Imports none of our packages: the typing hook comes first."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def _tiny(name):
    @pytest.fixture(scope="session")
    def folder(tmp_path_factory):
        import tiny

        return tiny.write(name, tmp_path_factory.mktemp("tiny") / name)

    return folder


tiny_sd3 = _tiny("sd3")
tiny_sd35 = _tiny("sd35")
tiny_flux_dev = _tiny("flux-dev")
tiny_flux_schnell = _tiny("flux-schnell")
