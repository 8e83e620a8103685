"""The sampling loop on meshes of a CPU's eight devices: what one device computes, dense and by plans."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.loops import Loop
from dfa2_jax.nn.attention import by_stack
from dfa2_jax.parallel.dealing import deal, deal_plan
from dfa2_jax.parallel.mesh import DeviceMesh
from dfa2_jax.plan.method import Method
from dfa2_jax.plan.plan import FULL_METHOD
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.loop import HeadPlans, denoise_planned
from dfa2_jax.sampling.tokens import Grid
from pallas_kernels import CACHED

STEPS = 3
SMALL = {"attention_head_dim": 16, "joint_attention_dim": 48, "pooled_projection_dim": 32}
FLUX = {"num_attention_heads": 8, "num_layers": 1, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6)}
SD35 = {"num_attention_heads": 6, "num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
FAMILIES = {
    "flux": ("FluxTransformer2DModel", FLUX | {"guidance_embeds": True}),
    "sd35": ("SD3Transformer2DModel", SD35 | {"caption_projection_dim": 96, "pos_embed_max_size": 16}),
}


@functools.cache
def loop_of(family):
    """On one device; 25 visual and 13 text tokens, which nothing divides."""
    name, config = FAMILIES[family]
    sizes = {"grid": Grid(1, 5, 5), "num_text": 13, "guided": family == "sd35", "steps": STEPS}
    loop = Loop(name, SMALL | config, **sizes, dtype=jnp.float32)
    loop.inputs = jax.device_put(np_positions(loop.inputs))
    return loop


def np_positions(inputs):
    """SD3's positions drawn: zeros would hide a share that is cut wrongly."""
    positions = getattr(inputs.conditions, "positions", None)
    if positions is not None:
        drawn = np.random.default_rng(1).standard_normal(positions.shape).astype(np.float32)
        object.__setattr__(inputs.conditions, "positions", drawn)
    return inputs


def mixed(loop, seed=0):
    """Full, two widths of arrows and cached heads, drawn anew for every layer and step."""
    plan = loop.plan(0.9, reuse=0.5)
    methods = FULL_METHOD, Method("cached"), Method.arrow(8), Method.arrow(4)
    choices = np.random.default_rng(seed).integers(0, 4, plan.choices.shape).astype(np.uint8)
    choices[0], choices[1, 0] = 0, 1  # a layer whose heads are all cached
    return type(plan)(plan.setting, methods, choices)


def on(loop, rows, tokens):
    """The loop on a mesh of this shape."""
    many = loop.on(rows * tokens)
    devices = np.array(jax.devices()[: rows * tokens]).reshape(rows, tokens)
    many.mesh = DeviceMesh(jax.sharding.Mesh(devices, ("rows", "tokens")))
    return many


def close(x, wanted):
    x, wanted = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(x - wanted) < 1e-5 * np.linalg.norm(wanted)


OFTEN = [("flux", 1, 2), ("flux", 1, 8), ("sd35", 2, 1), ("sd35", 2, 2), ("sd35", 1, 8)]
SELDOM = [("flux", 1, 4), ("sd35", 1, 2), ("sd35", 1, 4), ("sd35", 2, 4)]


@pytest.mark.parametrize(
    ("family", "rows", "tokens"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.long) for case in SELDOM)]
)
def test_a_mesh_computes_what_one_device_does(family, rows, tokens):
    one = loop_of(family)
    many, plan = on(one, rows, tokens), mixed(one)
    dense, (planned, _) = one.dense(0, STEPS), one.planned(one.caches(), plan, 0, STEPS)
    assert not np.allclose(dense, planned, atol=1e-3)
    close(many.dense(0, STEPS), dense)
    caches = many.caches()
    own = max(x.addressable_shards[0].data.shape[2] for x in caches.values())
    assert own == -(-13 // tokens) + -(-25 // tokens)
    out, caches = many.planned(caches, plan, 0, STEPS)
    close(out, planned)
    assert max(x.addressable_shards[0].data.shape[2] for x in caches.values()) == own


def test_any_dealing_gives_the_same_bits_and_compiles_nothing():
    one = loop_of("sd35")
    many, plan = on(one, 1, 4), mixed(one)
    wanted, _ = many.planned(many.caches(), plan, 0, STEPS)
    compiled = denoise_planned._cache_size()
    layers = [*many.layers.values()]
    windows, balanced = deal_plan(plan.half_windows(), layers, 4)
    costs = np.random.default_rng(0).random(windows.shape[2]) * (windows != CACHED)
    order = deal(costs, 4)
    assert (order != balanced).any()
    plans = HeadPlans(
        *(by_stack(many.calls, pad_steps(x), axis=1) for x in (windows, order)), first=np.zeros((), np.int32)
    )
    options = {"mesh": many.mesh, "frames": many.grid.frames}  # as `Loop.planned` names them
    state = denoise_planned(many.graph, many.params, many.start(many.caches()), many.inputs, plans, 0, STEPS, **options)
    np.testing.assert_array_equal(state.latents, wanted)
    many.planned(many.caches(), mixed(one, seed=1), 0, STEPS)
    assert denoise_planned._cache_size() == compiled
