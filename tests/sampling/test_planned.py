"""Compressed sampling: against diffusers with the same plan in its attention processors, and against itself."""

import re

import jax
import numpy as np
import pytest
from pipeline_cases import COMMON, PROMPTS, error, load_theirs, run_theirs

from dfa2_jax import Method, Plan, PlanError
from dfa2_jax.nn import attention
from dfa2_jax.options import Options
from dfa2_jax.sampling import loop as sampling
from pallas_kernels import CACHED

CASES = {
    "sd35 cfg, attn2, wide": ("tiny_sd35", {"height": 64, "width": 256, "guidance_scale": 5.0}),
    "flux, tall": ("tiny_flux_dev", {"height": 160, "width": 64}),
}
"""A CPU attends by tiles in the longer one, and to all heads at once in the other (`blockwise.SHORT`)."""


METHODS = tuple(map(Method, ("full", "cached", "arrow(1/4)", "arrow(1/8)", "arrow(1/16)")))


def random_plan(setting, seed):
    """Heads full, cached or arrows of one of three widths, mixed within layers; some layers are cached as a whole."""
    generator = np.random.default_rng(seed)
    size = setting.num_inference_steps, len(setting.layers), setting.num_heads
    choices = generator.integers(len(METHODS), size=size).astype(np.uint8)
    choices[generator.random(size[:2]) < 0.15] = 1
    choices[0] = 0
    return Plan(setting, METHODS, choices)


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_latents_equal_diffusers_with_the_plan_in_its_processors(case, pipelines, request):
    """Random plans.."""
    from torch_reference import follow_plan

    name, arguments = CASES[case]
    pipeline, theirs = pipelines(name), load_theirs(request.getfixturevalue(name))
    arguments = {"prompt": PROMPTS[0]} | COMMON | arguments
    setting = pipeline.setting(**arguments)
    errors = []
    for seed in range(4):
        plan = random_plan(setting, seed)
        latents = pipeline(**arguments, plan=plan, seed=seed, output_type="latent", progress=False).images
        run = follow_plan(theirs, plan.half_windows(), [layer.layout for layer in setting.layers])
        want = run_theirs(theirs, seed, **arguments, callback_on_step_end=run.next_step, output_type="latent")
        errors.append(error(latents, want))
    assert all(one < 1e-4 for one in errors), errors  # `max` would pass over a NaN
    dense = pipeline(**arguments, seed=seed, output_type="latent", progress=False).images
    assert error(latents, dense) > 1e-2  # the plans are not idle


@pytest.mark.parametrize("case", CASES)
def test_the_full_plan_is_the_dense_program_bit_for_bit(case, pipelines):
    name, arguments = CASES[case]
    pipeline = pipelines(name)
    call = pipeline.prepare(Options(prompt=PROMPTS[0], **COMMON | arguments))
    full, found = Plan.full(call.setting), {}
    for implementation in ("blockwise", "reference"):
        for plan in (None, full):
            run, state = call.program(plan, implementation=implementation)
            found[implementation, plan] = np.asarray(run(state, 0, call.request.steps).latents)
        np.testing.assert_array_equal(found[implementation, full], found[implementation, None])
    assert not np.array_equal(found["blockwise", full], found["reference", full])  # the names arrive


@pytest.mark.parametrize("case", CASES)
def test_steps_one_by_one_are_the_loop(case, pipelines):
    name, arguments = CASES[case]
    pipeline = pipelines(name)
    arguments = {"prompt": PROMPTS[0], "output_type": "latent"} | COMMON | arguments
    plan = random_plan(pipeline.setting(**arguments), 0)
    whole, watched = (pipeline(**arguments, plan=plan, progress=progress).images for progress in (False, True))
    np.testing.assert_array_equal(watched, whole)


def test_a_plan_decides_what_the_call_leaves_open_and_refuses_the_rest(pipelines):
    pipeline = pipelines("tiny_sd35")
    arguments = {"prompt": PROMPTS[0]} | COMMON | CASES["sd35 cfg, attn2, wide"][1]
    plan = Plan.full(pipeline.setting(**arguments)).with_method(1, 0, 0, "cached")
    images = pipeline(PROMPTS[1], plan=plan, progress=False, output_type="latent").images
    assert images.shape[2:] == (64 // 8, 256 // 8) or images.shape[3] * 64 == images.shape[2] * 256
    with pytest.raises(PlanError, match=r"height is 64 in the plan and 128 in the call: .*\n.*layers is"):
        pipeline(PROMPTS[1], plan=plan, height=128, progress=False)
    with pytest.raises(PlanError, match="doubled_batch is True in the plan and False in the call"):
        pipeline(PROMPTS[1], plan=plan, guidance_scale=1.0, progress=False)
    with pytest.raises(PlanError, match="sigmas is 8 steps in the plan and 9 steps in the call"):
        pipeline(PROMPTS[1], plan=plan, num_inference_steps=9, progress=False)
    other = [float(sigma) for sigma in plan.setting.sigmas[:-1]]
    with pytest.raises(PlanError, match="sigmas is 8 steps in the plan and 3 steps in the call"):
        pipeline(PROMPTS[1], plan=plan, sigmas=[1.0, 0.6, 0.3], progress=False)
    setting = plan.setting.model_copy(update={"sigmas": (*other[:5], other[5] - 0.01, *other[6:], 0.0)})
    with pytest.raises(PlanError, match=rf"sigmas is {other[5]} \(number 5\) in the plan and {other[5] - 0.01} "):
        plan.check(setting)


def test_the_plan_of_a_model_with_shorter_text_is_refused_as_such(pipelines):
    """Less text than this model's CLIPs take alone leaves no length for its T5."""
    pipeline = pipelines("tiny_sd35")
    setting = pipeline.setting(prompt="a", height=64, width=64, num_inference_steps=2)
    layers = tuple(one.model_copy(update={"num_text": min(one.num_text, 20)}) for one in setting.layers)
    plan = Plan.full(setting.model_copy(update={"layers": layers, "weights": "another"}))
    with pytest.raises(PlanError, match="weights is another in the plan"):
        pipeline("a", plan=plan, progress=False)


def test_caches_that_do_not_fit_are_refused_before_any_step(pipelines, monkeypatch):
    pipeline = pipelines("tiny_sd35")
    arguments = {"prompt": [PROMPTS[0]] * 3} | COMMON | CASES["sd35 cfg, attn2, wide"][1]
    plan = Plan.full(pipeline.setting(**arguments))
    layouts, size = [layer.layout for layer in plan.setting.layers], 2 * 3 * pipeline.config.width * 4
    need = size * sum(layout.length for layout in layouts)
    monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices: need)
    pipeline(**arguments, plan=plan, progress=False)
    monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices: need - 1)
    with pytest.raises(MemoryError, match=f"3 images of {layouts[0].length} tokens.*a batch of 2 would fit"):
        pipeline(**arguments, plan=plan, progress=False)


@pytest.fixture
def gpu_loops(monkeypatch):
    """The sampling loop as it is for a GPU: steps that take branches around projections are another inner loop."""
    monkeypatch.setattr(sampling, "gpu_kind", lambda: "NVIDIA H200")
    sampling.denoise_planned.clear_cache()
    yield
    sampling.denoise_planned.clear_cache()


@pytest.mark.parametrize("num_rows", [11_999, 12_000])
@pytest.mark.parametrize("num_heads", [1, 3, 24, 38])
def test_a_layer_projects_no_more_heads_than_it_must(num_heads, num_rows):
    branches = attention.ProjectionBranches.best(num_rows, False)
    counts = branches.counts(num_heads)
    assert counts[0] == 0 and counts[-1] == num_heads and len(counts) <= (7 if num_rows == 12_000 else 3)
    computed = np.arange(num_heads + 1)[:, None] > np.arange(num_heads)
    chosen = branches.branch(jax.numpy.where(computed, 5, CACHED))
    assert [counts[i] for i in chosen] == [min(c for c in counts if c >= n) for n in range(num_heads + 1)]


@pytest.mark.parametrize(
    ("case", "long", "worth"), [("flux, tall", False, 1 / 4), ("sd35 cfg, attn2, wide", True, 1 / 8)]
)
def test_steps_that_skip_projections_give_what_others_give(case, long, worth, pipelines, request, monkeypatch):
    if long:
        monkeypatch.setattr(attention, "MANY_ROWS", 1)
    name, arguments = CASES[case]
    pipeline = pipelines(name)
    arguments = {"prompt": PROMPTS[0], "output_type": "latent", "progress": False} | COMMON | arguments
    setting = pipeline.setting(**arguments)
    choices = random_plan(setting, 1).choices
    generator = np.random.default_rng(0)
    share = generator.random(choices.shape[:2])  # of each step and layer
    share[1], share[2] = 0, 1
    reused = generator.random(choices.shape) < share[..., None]
    reused[0] = False
    plan = Plan(setting, METHODS, np.where(reused, 1, np.where(choices == 1, 2, choices)).astype(np.uint8))
    made = (plan.half_windows() != CACHED).sum(-1)
    if not long:  # none, two or all four
        made = 2 * -(-made // 2)
    skips = 1 - made.mean(-1) / setting.num_heads > worth
    assert skips.any() and not skips[1:].all()
    assert set(made[skips].ravel()) == ({*range(5)} if long else {0, 2, 4}), "every branch is taken"

    def run(planned):
        monkeypatch.setattr(sampling, "Planned", planned)
        sampling.denoise_planned.clear_cache()
        return pipeline(**arguments, plan=plan).images

    ran = []

    class Counted(attention.Planned):
        def __call__(self, *args):
            jax.debug.callback(lambda: ran.append(self.skip_projections))
            return super().__call__(*args)

    want = run(lambda implementation, *_: attention.Planned(implementation, skip_projections=False))
    request.getfixturevalue("gpu_loops")
    np.testing.assert_allclose(run(Counted), want, atol=1e-5)
    jax.effects_barrier()
    layers = len(setting.layers)
    assert (ran.count(True), ran.count(False)) == (skips.sum() * layers, (~skips).sum() * layers)


def test_no_step_is_no_step(pipelines):
    pipeline = pipelines("tiny_flux_dev")
    call = pipeline.prepare(Options(prompt=PROMPTS[0], **COMMON | {"height": 64, "width": 64}))
    for plan in (None, Plan.full(call.setting)):
        for start in (0, 2):
            run, state = call.program(plan)
            before = np.array(state.latents)
            np.testing.assert_array_equal(run(state, start, start).latents, before)


@pytest.mark.parametrize("case", CASES)
def test_no_stack_of_caches_is_copied_on_a_cpu_either(case, pipelines):
    """On a GPU: test_planned_aot.py. A copy of all layers for each of them would grow with the square of the depth."""
    name, arguments = CASES[case]
    pipeline = pipelines(name)
    call = pipeline.prepare(Options(prompt=PROMPTS[0], **COMMON | arguments))
    plan = Plan.full(call.setting)
    _, state = call.program(plan)
    graph, params, plans = pipeline.transformer.graph, pipeline.transformer.params, call.step_plans(plan)
    hlo = sampling.denoise_planned.lower(graph, params, state, call.inputs, plans, 0, 4).compile().as_text()
    stacks = {f"f32[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(state.memory)}
    made = re.findall(r"= (\S+\])\{[^ ]*\} ([\w-]+)\(", hlo)
    assert stacks <= {shape for shape, _ in made}
    assert [(shape, opcode) for shape, opcode in made if shape in stacks and "copy" in opcode] == []


def test_skip_layer_guidance_runs_dense_and_leaves_the_caches_alone(pipelines):
    pipeline = pipelines("tiny_sd35")
    arguments = {"prompt": PROMPTS[0], "output_type": "latent", "progress": False, "skip_guidance_layers": [1]}
    arguments |= COMMON | CASES["sd35 cfg, attn2, wide"][1]
    plan = Plan.full(pipeline.setting(**arguments))
    output = pipeline(**arguments, plan=plan)
    np.testing.assert_array_equal(output.images, pipeline(**arguments).images)
    assert output.metadata["density"] == 1


def test_density_counts_the_forward_of_skip_layer_guidance(pipelines):
    """Four steps of two forwards, and at two of them one more, dense and without block 1."""
    pipeline = pipelines("tiny_sd35")
    arguments = {"prompt": PROMPTS[0], "num_inference_steps": 4, "output_type": "latent", "progress": False}
    arguments |= {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.6}
    plan = Plan.full(pipeline.setting(**arguments)).with_method([1, 3], None, None, "cached")
    pairs = {layer.name: layer.layout.length**2 for layer in plan.setting.layers}
    every, more = 8 * sum(pairs.values()), 2 * sum(size for name, size in pairs.items() if not name.endswith(".1"))
    assert {"joint.1", "attn2.0"} <= set(pairs) and plan.density() == 0.5
    output = pipeline(**arguments, plan=plan)
    assert output.metadata["density"] == pytest.approx((every / 2 + more) / (every + more))
