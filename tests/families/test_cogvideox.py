"""CogVideoX's transformer and positions against diffusers, and what its config.json may not ask for."""

import json
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lowering import assert_highest_precision
from pipeline_cases import error

from dfa2_jax.families.cogvideox.config import CogVideoXConfig
from dfa2_jax.families.cogvideox.family import CogVideoX
from dfa2_jax.families.cogvideox.positions import position_table, rope_table
from dfa2_jax.families.cogvideox.transformer import CogVideoXConditions
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.nn.attention import Dense
from dfa2_jax.sampling.sinusoid import sinusoid
from dfa2_jax.sampling.tokens import Grid, VideoPatches

FOLDERS = ["tiny_cogvideox_2b", "tiny_cogvideox_5b", "tiny_cogvideox_15"]
SIZES = {
    "tiny_cogvideox_2b": [(3, 6, 10), (2, 8, 6)],
    "tiny_cogvideox_5b": [(3, 6, 10), (2, 4, 14)],
    "tiny_cogvideox_15": [(4, 6, 10), (2, 4, 8)],
}
"""Latent frames, rows and columns: those of the sample size, and others."""

TIME, BATCH = 499, 2


@cache
def theirs(folder, dtype="float32"):
    import torch
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", dtype=getattr(torch, dtype))


@cache
def ours(folder, dtype=jnp.float32):
    return nnx.split(open_checkpoint(folder).load("transformer", dtype))


def rope_of_diffusers(config, frames, height, width):
    """As its pipeline makes it of latents of a size."""
    from diffusers import CogVideoXPipeline

    pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
    of_pixels = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return of_pixels(pipeline, 8 * height, 8 * width, frames, "cpu")


class Case:
    """One input for both sides, and both sides' forward."""

    def __init__(self, folder, size):
        self.folder, self.size = folder, size
        self.config = CogVideoXConfig.from_json(json.loads((folder / "transformer" / "config.json").read_text()))
        draw = np.random.default_rng(0).standard_normal
        frames, height, width = size
        self.latents = draw((BATCH, frames, self.config.in_channels, height, width)).astype(np.float32)
        self.text = draw((BATCH, self.config.max_text_seq_length, self.config.text_embed_dim)).astype(np.float32)
        self.tokens = VideoPatches(2, self.config.token_frames)
        self.grid = self.tokens.grid(*size)

    def inputs(self, dtype):
        text = jnp.asarray(self.text, dtype)
        if self.config.use_rotary_positional_embeddings:
            cos, sin = rope_table(self.config, text.shape[1], self.grid)
            conditions = CogVideoXConditions(text, cos=cos, sin=sin)
        else:
            conditions = CogVideoXConditions(text, table=position_table(self.config, self.grid))
        timestep = sinusoid(np.array([TIME], np.float32), self.config.width)
        return self.tokens.pack_noise(self.latents), timestep, conditions

    def ours(self, dtype=jnp.float32, **kwargs):
        graph, params = ours(self.folder, dtype)
        forward = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args, **kwargs)[0])
        return np.asarray(forward(params, *self.inputs(dtype)), np.float64)

    def theirs(self, dtype="float32", left_out=()):
        import torch

        model, to = theirs(self.folder, dtype), partial(torch.as_tensor, dtype=getattr(torch, dtype))
        rope = rope_of_diffusers(model.config, *self.size) if self.config.use_rotary_positional_embeddings else None
        blocks = model.transformer_blocks
        try:
            model.transformer_blocks = torch.nn.ModuleList(b for i, b in enumerate(blocks) if i not in left_out)
            with torch.no_grad():
                time = torch.full((BATCH,), TIME)
                out = model(to(self.latents), to(self.text), time, image_rotary_emb=rope, return_dict=False)[0]
        finally:
            model.transformer_blocks = blocks
        return self.tokens.pack_noise(out.double().numpy())


def cases(names=FOLDERS):
    return [pytest.param(name, size, id=f"{name[15:]}-{size}") for name in names for size in SIZES[name]]


@pytest.mark.torch
@pytest.mark.parametrize(("name", "size"), cases())
def test_float32_forward_equals_diffusers(name, size, request):
    case = Case(request.getfixturevalue(name), size)
    assert error(case.ours(), case.theirs()) < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("name", FOLDERS)
def test_bfloat16_forward_is_as_close_to_float32_as_torch(name, request):
    case = Case(request.getfixturevalue(name), SIZES[name][1])
    exact = case.theirs()
    assert error(case.ours(jnp.bfloat16), exact) < 1.5 * error(case.theirs("bfloat16"), exact)


@pytest.mark.torch
@pytest.mark.parametrize("skip", [[1], [0, 2]])
def test_skipped_blocks_are_left_out(skip, tiny_cogvideox_5b):
    case = Case(tiny_cogvideox_5b, SIZES["tiny_cogvideox_5b"][1])
    skipped = case.ours(skipped_blocks=jnp.isin(jnp.arange(3), jnp.asarray(skip, jnp.int32)))
    assert error(skipped, case.theirs(left_out=skip)) < 1e-5


def test_ways_to_run_it_agree(tiny_cogvideox_15):
    case = Case(tiny_cogvideox_15, SIZES["tiny_cogvideox_15"][1])
    usual = case.ours(attend=Dense("reference"))
    assert error(case.ours(attend=Dense("blockwise")), usual) < 1e-5
    assert error(case.ours(unroll=True), usual) < 1e-5


@pytest.mark.parametrize("name", FOLDERS)
def test_float32_products_are_ieee(name, request):
    case = Case(request.getfixturevalue(name), SIZES[name][1])
    graph, params = ours(case.folder)
    traced = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args)[0]).trace(params, *case.inputs(jnp.float32))
    assert_highest_precision(traced.lower(lowering_platforms=("cuda",)))


PUBLISHED = {"num_attention_heads": 30, "sample_height": 60, "sample_width": 90}
GRIDS = [Grid(2, 30, 45), Grid(7, 9, 9), Grid(2, 45, 11), Grid(1, 7, 61)]
"""What the 2B and the 5B model were trained on; a square, a tall and a wide one."""


@pytest.mark.torch
@pytest.mark.parametrize("scales", [(1.875, 1.0), (1.5, 2.0)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_position_table_equals_diffusers(grid, scales):
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    spatial, temporal = scales
    interpolation = {"spatial_interpolation_scale": spatial, "temporal_interpolation_scale": temporal}
    config = CogVideoXConfig(**PUBLISHED, **interpolation)
    size = grid.columns, grid.rows
    want = get_3d_sincos_pos_embed(config.width, size, grid.frames, *scales, output_type="pt")
    want = want.reshape(grid.num_visual, config.width).numpy()
    np.testing.assert_allclose(position_table(config, grid), want, rtol=0, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("patch_size_t", [None, 2])
@pytest.mark.parametrize("grid", [*GRIDS[:2], Grid(4, 30, 11), Grid(3, 5, 45)], ids=str)
def test_rotary_positions_equal_diffusers(grid, patch_size_t):
    config = CogVideoXConfig(**PUBLISHED, use_rotary_positional_embeddings=True, patch_size_t=patch_size_t)
    num_text = 5
    frames = grid.frames * config.token_frames
    want = rope_of_diffusers(config, frames, 2 * grid.rows, 2 * grid.columns)
    for table, theirs, of_text in zip(rope_table(config, num_text, grid), want, (1, 0), strict=True):
        assert table.dtype == np.float32 and (table[:num_text] == of_text).all(), "text is not rotated"
        pairs = theirs.numpy().reshape(grid.num_visual, -1, 2)
        np.testing.assert_array_equal(pairs[..., 0], pairs[..., 1])
        np.testing.assert_allclose(table[num_text:], pairs[..., 0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("frames", [1, 2])
def test_tokens_of_a_video_round_trip_and_are_in_order(frames):
    tokens, grid = VideoPatches(2, frames), Grid(3, 2, 4)
    shape = tokens.noise_shape(5, grid)
    assert shape == (3 * frames, 5, 4, 8) and tokens.grid(3 * frames, 4, 8) == grid
    noise = np.arange(2.0 * np.prod(shape)).reshape(2, *shape)
    packed = tokens.pack_noise(noise)
    np.testing.assert_array_equal(tokens.unpack(packed, grid), noise.swapaxes(1, 2))
    np.testing.assert_array_equal(tokens.pack(noise.swapaxes(1, 2)), packed)
    boxes = product(range(grid.frames), range(grid.rows), range(grid.columns))
    for number, (t, y, x) in enumerate(boxes):
        inside = [
            noise[1, frames * t + dt, c, 2 * y + dy, 2 * x + dx]
            for c, dt, dy, dx in product(range(5), range(frames), range(2), range(2))
        ]
        np.testing.assert_array_equal(packed[1, number], inside)
    assert packed.shape[1] == number + 1


@pytest.mark.parametrize(("latent_frames", "token_frames"), [(1, 1), (2, 1), (3, 2), (21, 11)])
def test_a_grid_holds_an_odd_number_of_latent_frames(latent_frames, token_frames):
    assert VideoPatches(2, 2).grid(latent_frames, 4, 4).frames == token_frames


JSON = {"in_channels": 16, "out_channels": 16, "use_rotary_positional_embeddings": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 32}, r"out_channels=16 is not supported: text to video has 32"),
        ({"ofs_embed_dim": 512}, "ofs_embed_dim=512 is not supported: text to video has None"),
        ({"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings=True is not supported"),
        ({"attention_bias": False}, "attention_bias=False is not supported: text to video has True"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu' is not supported"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos=False is not supported"),
        ({"patch_size_t": 2, "use_rotary_positional_embeddings": False}, "patch_size_t=2 needs use_rotary_positional"),
        ({"num_layers": 0}, "num_layers=0 must be 1 or more"),
        ({"attention_head_dim": 24}, "attention_head_dim=24 must be a multiple of 16"),
    ],
    ids=str,
)
def test_a_config_that_is_not_implemented_is_refused_by_name(changes, message):
    CogVideoXConfig.from_json(JSON)
    CogVideoXConfig.from_json(JSON | {"out_channels": None})
    with pytest.raises(ValueError, match=message):
        CogVideoXConfig.from_json(JSON | changes)


def test_a_video_larger_than_the_positions_of_15_is_refused():
    """diffusers fails with a shape."""
    sample = {"use_rotary_positional_embeddings": True, "sample_height": 96, "sample_width": 170}
    newer, older = (CogVideoX(CogVideoXConfig(**sample, patch_size_t=t), {}, nnx.Module()) for t in (2, None))
    assert newer.size(768, 1360, 16) == (768, 1360)
    for size, tokens in (((784, 1360), "49 x 85"), ((768, 1376), "48 x 86")):
        with pytest.raises(ValueError, match=rf"{tokens} tokens exceed the model's 48 x 85 .*sample_height=96"):
            newer.size(*size, 16)
        assert older.size(*size, 16) == size
