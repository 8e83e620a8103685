"""HunyuanVideo's transformer and positions against diffusers, and what its config.json may not ask for."""

from functools import cache, partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from lowering import assert_highest_precision
from pipeline_cases import error
from torch_models import redraw
from video_models import loaded, tensors_of

from dfa2_jax.families.hunyuanvideo.config import HunyuanVideoConfig
from dfa2_jax.families.hunyuanvideo.positions import rope_table
from dfa2_jax.families.hunyuanvideo.rules import RULES
from dfa2_jax.families.hunyuanvideo.transformer import HunyuanVideoConditions, HunyuanVideoTransformer
from dfa2_jax.nn.attention import Dense
from dfa2_jax.sampling.sinusoid import sinusoid
from dfa2_jax.sampling.tokens import Grid, VideoPatches
from dfa2_jax.weights.rules import map_weights
from dfa2_jax.weights.spec import ComponentSpec

SPEC = ComponentSpec(
    class_name="HunyuanVideoTransformer3DModel",
    config=HunyuanVideoConfig.from_json,
    build=HunyuanVideoTransformer,
    rules=RULES,
)
SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}
PATCHES, GRID, TEXT, LENGTHS = VideoPatches(2), Grid(3, 4, 5), 12, (7, 12)
TIME, GUIDANCE = 731.0, 6.0


@cache
def theirs(guidance_embeds=True, dtype="float32"):
    model = diffusers.HunyuanVideoTransformer3DModel(**SIZES, guidance_embeds=guidance_embeds)
    return redraw(model).to(getattr(torch, dtype))


@cache
def ours(guidance_embeds=True, dtype=jnp.float32):
    return nnx.split(loaded(theirs(guidance_embeds), dtype, SPEC))


def drawn():
    """Latents as diffusers has them, and text, whose padding is large: it shows wherever it is read."""
    draw = np.random.default_rng(0).standard_normal
    latents = draw((2, 4, GRID.frames, 2 * GRID.rows, 2 * GRID.columns)).astype(np.float32)
    text, pooled = draw((2, TEXT, 24)).astype(np.float32), draw((2, 20)).astype(np.float32)
    text[0, LENGTHS[0] :] = 50
    return latents, text, pooled


def torch_sinusoid(x):
    """As diffusers computes it, whose exponents differ from ours in the last place: 2e-5 of an angle of 6000."""
    embedding = diffusers.models.embeddings.get_timestep_embedding
    return embedding(torch.from_numpy(x), 256, flip_sin_to_cos=True, downscale_freq_shift=0).numpy()


def predicted(guidance_embeds=True, dtype=jnp.float32, lengths=LENGTHS, sinusoid=torch_sinusoid, **options):
    graph, params = ours(guidance_embeds, dtype)
    latents, text, pooled = drawn()
    cos, sin = rope_table(HunyuanVideoConfig.from_json(SIZES), GRID, TEXT)
    guidance = sinusoid(np.float32([1000 * GUIDANCE])) if guidance_embeds else None
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    states = jnp.asarray(text, dtype), jnp.asarray(pooled, dtype)
    conditions = HunyuanVideoConditions(*states, cos, sin, guidance, lengths)
    forward = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args, **options)[0])
    tokens = forward(params, PATCHES.pack(latents), sinusoid(np.float32([TIME])), conditions)
    return PATCHES.unpack(np.asarray(tokens, np.float64), GRID)


def expected(guidance_embeds=True, dtype="float32", lengths=LENGTHS, left_out=()):
    model, to = theirs(guidance_embeds, dtype), partial(torch.as_tensor, dtype=getattr(torch, dtype))
    latents, text, pooled = map(to, drawn())
    mask = (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).to(text.dtype)
    blocks = model.transformer_blocks, model.single_transformer_blocks
    first = 0, len(blocks[0])
    kept = [
        [block for i, block in enumerate(part, start) if i not in left_out]
        for part, start in zip(blocks, first, strict=True)
    ]
    guidance = to([1000 * GUIDANCE] * 2) if guidance_embeds else None
    try:
        model.transformer_blocks, model.single_transformer_blocks = map(torch.nn.ModuleList, kept)
        with torch.no_grad():
            time = torch.tensor([TIME] * 2)
            return model(latents, time, text, mask, pooled, guidance, return_dict=False)[0].double().numpy()
    finally:
        model.transformer_blocks, model.single_transformer_blocks = blocks


@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, (1, 4)], ids=str)
def test_float32_forward_equals_diffusers(guidance_embeds, lengths):
    """Texts differ in length."""
    assert error(predicted(guidance_embeds, lengths=lengths), expected(guidance_embeds, lengths=lengths)) < 3e-6


def test_our_sinusoid_of_the_guidance_is_as_near_as_float32_angles_allow():
    assert error(predicted(sinusoid=sinusoid), expected()) < 2e-5


def test_text_without_padding_needs_no_lengths():
    whole = predicted(lengths=(TEXT, TEXT))
    assert error(predicted(lengths=None), whole) < 1e-6


def test_bfloat16_forward_is_as_close_to_float32_as_torch():
    """At guidance that bfloat16 has exactly: 6000 would be 6016 in torch's."""
    exact = expected(guidance_embeds=False)
    assert error(predicted(False, jnp.bfloat16), exact) < 1.5 * error(expected(False, "bfloat16"), exact)


@pytest.mark.parametrize("skip", [[1], [0, 3, 4]])
def test_skipped_blocks_are_left_out(skip):
    skipped = predicted(skipped_blocks=jnp.isin(jnp.arange(5), jnp.asarray(skip, jnp.int32)))
    assert error(skipped, expected(left_out=skip)) < 1e-5


def test_ways_to_run_it_agree():
    usual = predicted(attend=Dense("reference"))
    assert error(predicted(attend=Dense("blockwise")), usual) < 1e-5
    assert error(predicted(unroll=True), usual) < 1e-5


def test_float32_products_are_ieee():
    graph, params = ours()
    _, text, pooled = drawn()
    cos, sin = rope_table(HunyuanVideoConfig.from_json(SIZES), GRID, TEXT)
    conditions = HunyuanVideoConditions(text, pooled, cos, sin, sinusoid(np.float32([6000])), jnp.array(LENGTHS))
    arguments = PATCHES.pack(drawn()[0]), sinusoid(np.float32([TIME])), conditions
    traced = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args)[0]).trace(params, *arguments)
    assert_highest_precision(traced.lower(lowering_platforms=("cuda",)))


@pytest.mark.parametrize("grid", [Grid(33, 45, 2), Grid(2, 3, 80), Grid(1, 1, 1)], ids=str)
def test_rotary_positions_equal_diffusers(grid):
    config = HunyuanVideoConfig()
    rope = diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoRotaryPosEmbed(
        config.patch_size, config.patch_size_t, list(config.rope_axes_dim), config.rope_theta
    )
    want = rope(torch.empty(1, 1, grid.frames, 2 * grid.rows, 2 * grid.columns))
    for table, theirs, of_text in zip(rope_table(config, grid, 5), want, (1, 0), strict=True):
        assert table.dtype == np.float32 and (table[-5:] == of_text).all(), "text is not rotated"
        pairs = theirs.numpy().reshape(grid.num_visual, -1, 2)
        np.testing.assert_allclose(table[:-5], pairs[..., 0], rtol=0, atol=2e-5)


def test_the_published_model_maps_and_counts():
    with torch.device("meta"):
        model = diffusers.HunyuanVideoTransformer3DModel()
    config = HunyuanVideoConfig.from_json(dict(model.config))
    module = nnx.eval_shape(lambda: HunyuanVideoTransformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.split(module)[1])}
    assert map_weights(tensors_of(model), RULES, shapes, "meta").keys() == shapes.keys()
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e9, 2) == 12.82


JSON = {"in_channels": 16, "out_channels": 16, "image_condition_type": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 33}, r"out_channels=16 is not supported: text to video has 33"),
        ({"image_condition_type": "token_replace"}, "image_condition_type='token_replace' is not supported"),
        ({"qk_norm": None}, "qk_norm=None is not supported: text to video has 'rms_norm'"),
        ({"rope_axes_dim": (16, 56)}, "must be three sizes that add up to"),
        ({"num_refiner_layers": 0}, "num_refiner_layers=0 must be 1 or more"),
    ],
    ids=str,
)
def test_a_config_that_is_not_implemented_is_refused_by_name(changes, message):
    HunyuanVideoConfig.from_json(JSON)
    with pytest.raises(ValueError, match=message):
        HunyuanVideoConfig.from_json(JSON | changes)
