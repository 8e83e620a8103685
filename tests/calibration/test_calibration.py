"""Calibration against an independent float64 oracle, and what must hold of its plans."""

from dataclasses import dataclass, field
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfa2_jax import Method, calibrate
from dfa2_jax.calibration import attends
from dfa2_jax.calibration import calibrate as calibration
from dfa2_jax.options import Options
from dfa2_jax.plan.plan import Plan
from pallas_kernels import CACHED, FULL

PROMPTS = ["a large red circle on the left of a blue background", "a small green star"]
CASES = {
    "tiny_sd35": {"height": 128, "width": 160, "negative_prompt": "blurry", "guidance_scale": 5.0},
    "tiny_flux_dev": {"height": 160, "width": 128},
}
COMMON = {"num_inference_steps": 5, "max_sequence_length": 24, "tiles": (16, 16), "windows": (4, 8), "progress": False}


def find(pipeline, name, **options):
    return calibrate(pipeline, PROMPTS, **COMMON | CASES[name] | {"delta": 0.4} | options)


@dataclass
class Oracle:
    """Attention in NumPy and float64 that follows a plan and judges every candidate of every head on the way."""

    plan: Plan
    previous: dict = field(default_factory=dict)
    errors: list = field(default_factory=list)
    """[steps after the first][layers] of arrays [heads, methods], the first of them full."""

    def __call__(self, step, layer, q, k, v):
        layout = self.plan.setting.layers[layer].layout
        dense = self.attend(q, k, v, FULL, layout)
        out = dense.copy()
        if step > 0:
            spread = ((dense - dense.mean((0, 1, 3), keepdims=True)) ** 2).mean((0, 1, 3))
            errors = []
            for number, method in enumerate(self.plan.methods):
                window = method.half_window(layout.num_visual)
                other = self.previous[layer] if window == CACHED else self.attend(q, k, v, window, layout)
                errors.append(((other - dense) ** 2).mean((0, 1, 3)) / spread)
                taken = self.plan.choices[step, layer] == number
                out[:, :, taken] = other[:, :, taken]
            self.errors.append(np.stack(errors, 1))
        self.previous[layer] = out
        return out

    @staticmethod
    def attend(q, k, v, window, layout):
        position = np.arange(layout.length)
        text = (position >= layout.text.start) & (position < layout.text.stop)
        kept = (np.abs(position[:, None] - position) <= window) | text[:, None] | text | (window == FULL)
        scores = np.where(kept, np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@dataclass(frozen=True)
class Watched:
    """Hands every q, k, v to the oracle; its plan is its number in order of execution."""

    oracle: Oracle
    step: jax.Array

    def memory(self, stack):
        return None

    def __call__(self, project, layout, memory, plan):
        q, k, v = project()

        def judge(step, layer, q, k, v):
            exact = (np.asarray(x, np.float64) for x in (q, k, v))
            return np.float32(self.oracle(int(step), int(layer), *exact))

        out = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return jax.experimental.io_callback(judge, out, self.step, plan, q, k, v, ordered=True), None


def follow(pipeline, plan, arguments):
    """Sample with the oracle's attention, step by step."""
    from flax import nnx

    from dfa2_jax.nn.attention import by_stack
    from dfa2_jax.sampling.loop import State, denoise_step

    call = pipeline.prepare(Options(prompt=PROMPTS, **arguments))
    transformer, oracle, tokens = pipeline.transformer, Oracle(plan), call.tokens
    model = nnx.merge(transformer.graph, transformer.params)
    numbers = by_stack(call.layers, np.arange(len(call.layers), dtype=np.int32))
    inputs = jax.tree.map(jnp.asarray, call.inputs)

    @jax.jit
    def one(tokens, step):
        state = State(tokens, jnp.zeros_like(tokens))
        return denoise_step(model, Watched(oracle, step), inputs, step, state, numbers).latents

    for step in range(call.request.steps):
        tokens = one(tokens, jnp.int32(step)).block_until_ready()
    return oracle


@pytest.mark.parametrize(("name", "delta"), [*zip(CASES, (0.1, 0.6), strict=True)])
def test_an_oracle_in_float64_finds_the_same_errors_and_no_better_choice(name, delta, pipelines, seen):
    """Teacher-forced: the oracle follows our choices, so that both judge the same queries, keys and values."""
    pipeline = pipelines(name)
    plan = find(pipeline, name, delta=delta)
    arguments = {
        key: value for key, value in (COMMON | CASES[name]).items() if key not in ("tiles", "windows", "progress")
    }
    oracle = follow(pipeline, plan, arguments)

    layers, heads = len(plan.setting.layers), plan.setting.num_heads
    judged = np.array(oracle.errors).reshape(len(seen), layers, heads, len(plan.methods))
    assert np.abs(judged[..., 0]).max() < 1e-12  # full
    np.testing.assert_allclose(np.array(seen), judged[..., 1:], rtol=1e-5, atol=1e-5)

    bound, chosen = 1.5 * delta / heads, plan.choices[1:]
    spent = np.take_along_axis(judged, chosen[..., None].astype(int), -1)[..., 0]
    assert spent.max() < bound + 1e-5 and spent.sum(-1).max() <= delta + 1e-5
    np.testing.assert_allclose(spent.sum(-1), np.array(plan.calibration.errors)[1:], atol=1e-5)
    for step, layer in product(range(len(seen)), range(layers)):
        windows = np.array([m.half_window(plan.setting.layers[layer].num_visual) for m in plan.methods], np.int32)
        saved = np.array(attends.saved_tiles(windows, plan.setting.layers[layer].layout, (16, 16)))
        assert saved[chosen[step, layer]].sum() >= best(judged[step, layer], saved, delta - 1e-5, bound - 1e-5)


def best(errors, saved, delta, bound):
    """The most that heads one after another can save: for every total, the least sum of errors."""
    least = {0: 0.0}
    for head in errors:
        grown = dict(least)
        for (total, spent), (error, gain) in product(least.items(), zip(head, saved, strict=True)):
            if error < bound and spent + error <= delta:
                grown[total + gain] = min(grown.get(total + gain, np.inf), spent + error)
        least = grown
    return max(least)


@pytest.mark.parametrize("name", CASES)
def test_a_larger_budget_gives_a_sparser_plan_and_compiles_nothing(name, pipelines, compilations):
    pipeline = pipelines(name)
    find(pipeline, name, delta=0.05)
    compilations.clear()
    plans = [find(pipeline, name, delta=delta, c=c) for delta, c in ((0.05, 1.5), (0.3, 1.5), (1.0, 1.5), (3.0, None))]
    assert compilations == []
    densities = [plan.density((16, 16)) for plan in plans]
    assert densities == sorted(densities, reverse=True) and densities[0] > densities[-1] + 0.2
    arguments = {"prompt": PROMPTS[0], "output_type": "latent", "progress": False, "seed": 3}
    dense = pipeline(**arguments, plan=Plan.full(plans[0].setting)).images
    errors = [np.linalg.norm(pipeline(**arguments, plan=plan).images - dense) for plan in plans]
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", CASES)
def test_heads_in_another_order_have_the_same_plan_in_that_order(name, pipelines):
    pipeline = pipelines(name)
    heads, kept = pipeline.config.num_attention_heads, pipeline.transformer.params
    plan, order = find(pipeline, name, delta=0.6), np.random.default_rng(0).permutation(heads)
    assert not np.array_equal(plan.choices[..., order], plan.choices)

    def permute(path, x):
        names = [str(getattr(key, "key", key)) for key in path]
        if any(name in names for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")):
            return x.reshape(*x.shape[:-1], heads, -1)[..., order, :].reshape(x.shape)
        if any(name in names for name in ("to_out", "to_add_out")) and "kernel" in names:
            return x.reshape(*x.shape[:-2], heads, -1, x.shape[-1])[..., order, :, :].reshape(x.shape)
        return x

    pipeline.transformer.params = jax.tree_util.tree_map_with_path(permute, kept)
    try:
        np.testing.assert_array_equal(find(pipeline, name, delta=0.6).choices, plan.choices[..., order])
    finally:
        pipeline.transformer.params = kept


@pytest.fixture
def seen(monkeypatch):
    """Errors of every candidate that calibrations find, [layers, heads, candidates] by step."""
    found, add = [], calibration.Checkpointed.add
    monkeypatch.setattr(
        calibration.Checkpointed, "add", lambda self, picks, errors: (found.append(errors), add(self, picks, errors))
    )
    return found


@pytest.mark.parametrize("name", CASES)
def test_chunks_of_the_batch_change_nothing(name, pipelines, seen):
    pipeline = pipelines(name)
    plan, chunked = find(pipeline, name, delta=0.6), find(pipeline, name, delta=0.6, attention_chunk=1)
    np.testing.assert_array_equal(plan.choices, chunked.choices)
    whole, parts = np.split(np.array(seen), 2)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="attention_chunk=3 must divide the batch of"):
        find(pipeline, name, attention_chunk=3)


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_calibration_goes_on(name, pipelines, tmp_path, monkeypatch):
    pipeline, path = pipelines(name), tmp_path / "progress.json"
    whole, add = find(pipeline, name, delta=0.6), calibration.Checkpointed.add

    def stop(self, picks, errors):
        add(self, picks, errors)
        if self.steps == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibration.Checkpointed, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        find(pipeline, name, delta=0.6, resume=path)
    steps = []
    monkeypatch.setattr(calibration.Checkpointed, "add", lambda self, *found: (steps.append(1), add(self, *found)))
    assert find(pipeline, name, delta=0.6, resume=path) == whole
    assert len(steps) == 2  # of four after the first
    with pytest.raises(ValueError, match="remove it to start anew: it is the progress of another calibration"):
        find(pipeline, name, delta=0.5, resume=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -0.1}, "delta=-0.1 must be a number, not negative"),
        ({"delta": float("nan")}, "delta=nan must be"),
        ({"delta": 40.0}, "delta=40.0 is above 31"),
        ({"c": -1.0}, "c=-1.0 must be"),
        ({"windows": (8, 8)}, r"windows=\(8, 8\) must be different positive integers"),
        ({"windows": (0,)}, r"windows=\(0,\) must be different positive integers"),
        ({"windows": (), "cache": False}, "leave nothing to choose from"),
        ({"tiles": (16, 0)}, r"tiles=\(16, 0\) must be two positive integers"),
        ({"tiles": [16]}, r"tiles=\(16,\) must be two positive integers"),
        ({"seed": [1, 2]}, r"seed=\(1, 2\) must be an integer"),
        ({"height": 100}, "height x width = 100"),
        ({"guidance_scale": 1.0}, "negative_prompt='blurry' and .* have no effect with guidance_scale=1"),
    ],
)
def test_bad_arguments_are_named(options, message, pipelines, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        find(pipelines("tiny_sd35"), "tiny_sd35", **options)


def test_prompts_are_a_list_and_flux_takes_no_negative_one(pipelines, no_shape_checks):
    pipeline = pipelines("tiny_flux_dev")
    for prompts in ("a cat", [], [1]):
        with pytest.raises(ValueError, match="must be a list of texts, one at least"):
            calibrate(pipeline, prompts, progress=False)
    with pytest.raises(ValueError, match="negative_prompt='blurry' and true_cfg_scale=1.0 have no effect"):
        calibrate(pipeline, ["a cat"], negative_prompt="blurry", progress=False)


def test_arrows_that_save_nothing_are_told(pipelines, caplog):
    """On 8 x 8 visual tokens tiles of 128 hold every band."""
    options = {"height": 128, "width": 128, "num_inference_steps": 2}
    find(pipelines("tiny_flux_dev"), "tiny_flux_dev", **options, tiles=(128, 128))
    assert "arrow(1/4), arrow(1/8) save no tile of 128 queries x 128 keys in any layer (64 visual" in caplog.text
    caplog.clear()
    find(pipelines("tiny_flux_dev"), "tiny_flux_dev", **options, tiles=(16, 16))
    assert "save no tile" not in caplog.text


def test_the_hash_of_the_prompts_is_theirs_alone(pipelines):
    pipeline, options = pipelines("tiny_flux_dev"), COMMON | CASES["tiny_flux_dev"] | {"num_inference_steps": 2}
    known = [
        calibrate(pipeline, prompts, **options, seed=seed, delta=0.4).calibration
        for prompts, seed in ((PROMPTS, 0), (PROMPTS, 1), (PROMPTS[::-1], 0))
    ]
    hashes = [found.prompts_sha256 for found in known]
    assert hashes[0] == hashes[1] != hashes[2] and known[0].dtype == "float32"


def test_arrows_alone_and_caching_alone(pipelines):
    arrows = find(pipelines("tiny_flux_dev"), "tiny_flux_dev", delta=3.0, c=None, cache=False)
    assert CACHED not in arrows.half_windows() and arrows.density() < 1
    cached = find(pipelines("tiny_flux_dev"), "tiny_flux_dev", delta=3.0, c=None, windows=())
    assert set(np.unique(cached.half_windows())) == {FULL, CACHED}
    assert cached.methods == (Method("full"), Method("cached"))


@pytest.mark.parametrize(
    "budget",
    [
        {"delta": 0.4, "windows": (4,), "tiles": (16, 16)},
        {"psnr": 30.0},
        {"heads": "only", "speedup": 1.1, "windows": (4,), "tiles": (16, 16), "attention_share": 0.5},
    ],
    ids=["paper's", "steps", "heads"],
)
def test_a_bar_hides_no_compilation_and_phases_stand_before_it(budget, pipelines, bars, compilations, capsys):
    size = {"height": 48, "width": 112, "num_inference_steps": 4, "max_sequence_length": 16}
    jax.clear_caches()  # whatever other tests compiled
    calibrate(pipelines("tiny_sd35"), PROMPTS, **size, **budget)
    assert bars == [("calibrate", 0)] and compilations
    printed = capsys.readouterr().err
    places = [printed.index(word) for word in ("\rencoding ", "\rcompiling ", "\rcalibrate: ")]
    assert places == sorted(places)
