"""SD3, SD3.5 and FLUX.1 transformers against diffusers, from the same folders."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lowering import assert_highest_precision

from dfa2_jax.families.flux.positions import rope_table
from dfa2_jax.families.flux.transformer import FluxConditions
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.families.sd3.positions import crop_positions
from dfa2_jax.families.sd3.transformer import PositionTable, SD3Conditions
from dfa2_jax.nn.attention import Dense
from dfa2_jax.sampling.sinusoid import sinusoid
from dfa2_jax.sampling.tokens import (
    CHANNEL_ROW_COLUMN,
    ROW_COLUMN_CHANNEL,
    patchify,
    unpatchify,
)

FAMILIES = ["tiny_sd3", "tiny_sd35", "tiny_flux_dev", "tiny_flux_schnell"]
ROWS, COLUMNS, TEXT, BATCH = 8, 10, 30, 2
SIGMA, GUIDANCE = 0.5, 4.0  # exact in bfloat16, and so are their thousandfold

pytestmark = pytest.mark.torch


@pytest.fixture(params=FAMILIES)
def folder(request):
    return request.getfixturevalue(request.param)


class Case:
    """One input for both sides, and both sides' forward."""

    def __init__(self, folder):
        self.folder = folder
        config = json.loads((folder / "transformer" / "config.json").read_text())
        self.flux = config["_class_name"] == "FluxTransformer2DModel"
        self.guided = config.get("guidance_embeds", False)
        draw = np.random.default_rng(0).standard_normal
        self.latents = draw((BATCH, 16, 2 * ROWS, 2 * COLUMNS)).astype(np.float32)
        self.text = draw((BATCH, TEXT, config["joint_attention_dim"])).astype(np.float32)
        self.pooled = draw((BATCH, config["pooled_projection_dim"])).astype(np.float32)
        self.order = CHANNEL_ROW_COLUMN if self.flux else ROW_COLUMN_CHANNEL
        self.tokens = patchify(self.latents, 2, self.order)
        self.config = config

    def inputs(self, dtype):
        to = partial(jnp.asarray, dtype=dtype)
        timestep, text = sinusoid(np.array([1000 * SIGMA], np.float32)), (to(self.text), to(self.pooled))
        if not self.flux:
            return self.tokens, timestep, SD3Conditions(*text, crop_positions(self.table, ROWS, COLUMNS))
        rope = rope_table(tuple(self.config["axes_dims_rope"]), TEXT, ROWS, COLUMNS)
        guidance = sinusoid(np.array([1000 * GUIDANCE], np.float32)) if self.guided else None
        return self.tokens, timestep, FluxConditions(*text, *rope, guidance)

    def load(self, dtype):
        model = open_checkpoint(self.folder).load("transformer", dtype)
        tables = jax.tree.leaves(nnx.pop(model, PositionTable))
        self.table = tables[0] if tables else None
        return nnx.split(model)

    def ours(self, dtype=jnp.float32, **kwargs):
        graph, params = self.load(dtype)
        forward = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args, **kwargs)[0])
        return np.asarray(forward(params, *self.inputs(dtype)), np.float64)

    def theirs(self, dtype="float32", **kwargs):
        import torch
        from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

        cls, dtype = FluxTransformer2DModel if self.flux else SD3Transformer2DModel, getattr(torch, dtype)
        model = cls.from_pretrained(self.folder / "transformer", dtype=dtype)
        to = partial(torch.as_tensor, dtype=dtype)
        batch = {"encoder_hidden_states": to(self.text), "pooled_projections": to(self.pooled), "return_dict": False}
        with torch.no_grad():
            if not self.flux:
                timestep = torch.full((BATCH,), 1000 * SIGMA)
                out = model(to(self.latents), timestep=timestep, **batch, **kwargs)[0]
                return patchify(out.double().numpy(), 2, self.order)
            grid = np.stack(np.meshgrid(0, np.arange(ROWS), np.arange(COLUMNS), indexing="ij"), -1).reshape(-1, 3)
            ids = {"img_ids": to(grid), "txt_ids": torch.zeros(TEXT, 3, dtype=dtype)}
            guidance = torch.full((BATCH,), GUIDANCE) if self.guided else None
            timestep = torch.full((BATCH,), SIGMA, dtype=dtype)
            return model(to(self.tokens), timestep=timestep, guidance=guidance, **ids, **batch)[0].double().numpy()


def error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("unroll", [1, 2, True])
def test_float32_forward_equals_diffusers(folder, unroll):
    case = Case(folder)
    assert error(case.ours(unroll=unroll), case.theirs()) < 1e-5


def test_bfloat16_forward_is_as_close_to_float32_as_torch(folder):
    case = Case(folder)
    exact = case.theirs()
    assert error(case.ours(jnp.bfloat16), exact) < 1.5 * error(case.theirs("bfloat16"), exact)


@pytest.mark.parametrize("skip", [[], [1], [0, 2, 3], [0, 1, 2, 3]])
def test_skipped_layers_equal_diffusers(tiny_sd35, skip):
    case = Case(tiny_sd35)
    ours = case.ours(skipped_blocks=jnp.isin(jnp.arange(4), jnp.asarray(skip, jnp.int32)))
    assert error(ours, case.theirs(skip_layers=skip)) < 1e-5


def test_attention_implementations_agree(folder):
    case = Case(folder)
    assert error(case.ours(attend=Dense("blockwise")), case.ours(attend=Dense("reference"))) < 1e-5


def test_patchify_round_trip_and_order():
    latents = np.arange(2.0 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    for order in (ROW_COLUMN_CHANNEL, CHANNEL_ROW_COLUMN):
        np.testing.assert_array_equal(unpatchify(patchify(latents, 2, order), 2, order, 2, 3), latents)
    np.testing.assert_array_equal(patchify(latents, 2, CHANNEL_ROW_COLUMN)[0, 1], latents[0, :, :2, 2:4].ravel())
    np.testing.assert_array_equal(
        patchify(latents, 2, ROW_COLUMN_CHANNEL)[0, 3], latents[0, :, 2:, :2].transpose(1, 2, 0).ravel()
    )


def test_position_table_is_cropped_at_its_centre_and_has_a_limit():
    table = np.arange(36.0)[:, None]
    np.testing.assert_array_equal(crop_positions(table, 2, 4)[0, :, 0], [13, 14, 15, 16, 19, 20, 21, 22])
    with pytest.raises(ValueError, match="7 x 4 patches exceed the position table of 6 x 6"):
        crop_positions(table, 7, 4)


def test_float32_products_are_ieee(folder):
    case = Case(folder)
    graph, params = case.load(jnp.float32)
    traced = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args)[0]).trace(params, *case.inputs(jnp.float32))
    assert_highest_precision(traced.lower(lowering_platforms=("cuda",)))


def test_flux_wants_guidance_when_it_embeds_it(tiny_flux_dev):
    case = Case(tiny_flux_dev)
    graph, params = case.load(jnp.float32)
    tokens, timestep, conditions = case.inputs(jnp.float32)
    with pytest.raises(ValueError, match="guidance_embeds"):
        nnx.merge(graph, params)(tokens, timestep, replace(conditions, guidance=None))
