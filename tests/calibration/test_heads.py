"""Plans of heads by what their errors do: measured tables, their own runs, and one budget with steps."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline_cases import PROMPTS

from dfa2_jax import Plan, calibrate
from dfa2_jax.calibration.attention_share import shares_of
from dfa2_jax.calibration.calibrate import prepared
from dfa2_jax.calibration.heads import HeadRuns, StepShares, reuse_errors
from dfa2_jax.calibration.journal import Journal
from dfa2_jax.calibration.steps import StepPlans, StepRuns
from dfa2_jax.nn.attention import AttentionCall
from dfa2_jax.options import CalibrationOptions
from dfa2_jax.pipeline.call import Call
from dfa2_jax.plan.method import CACHED_METHOD, Method
from dfa2_jax.plan.view import summary
from dfa2_jax.report.metrics import psnr
from pallas_kernels import Layout

CALL = {"height": 128, "width": 96, "num_inference_steps": 6, "max_sequence_length": 16, "guidance_scale": 3.0}
HEADS = {"windows": (4,), "tiles": (16, 16), "progress": False}


@pytest.fixture(scope="module")
def progress(tmp_path_factory):
    """A file that keeps what was measured, for all tests."""
    return tmp_path_factory.mktemp("heads") / "progress"


@pytest.fixture(scope="module")
def only(pipelines, progress):
    """A plan whose heads alone are spared, of two thirds of attention."""
    return calibrate(
        pipelines("tiny_sd35"),
        PROMPTS,
        **CALL,
        **HEADS,
        heads="only",
        attention_share=1.0,
        speedup=1.5,
        resume=progress,
    )


def latents(pipeline, **options):
    return pipeline(**{"prompt": PROMPTS, "progress": False, "output_type": "latent"} | options).images


def test_the_plan_s_own_run_is_as_near_as_it_says(only, pipelines):
    pipeline, record = pipelines("tiny_sd35"), only.step_calibration
    assert len(only.nodes) == 6 and 0.6 < only.density((16, 16)) <= 2 / 3 and only.cost() <= 2 / 3
    assert (record.attention_share, record.projection_share, record.tiles) == (1.0, 0.0, (16, 16))
    dense, by_plan = latents(pipeline, **CALL), latents(pipeline, plan=only)
    error = np.mean((by_plan - dense) ** 2)
    assert error == pytest.approx(record.measured_error, rel=0.02)
    generator = np.random.default_rng(0)
    choices = only.choices.copy()
    choices[1:] = generator.permutation(choices[1:].ravel()).reshape(choices[1:].shape)
    drawn = replace(only, choices=choices, coefficients=np.zeros((0, 2)))
    assert error < 0.5 * np.mean((latents(pipeline, plan=drawn) - dense) ** 2)


def test_another_budget_takes_what_was_measured(only, pipelines, progress, monkeypatch, compilations):
    monkeypatch.setattr(HeadRuns, "_measured", lambda *_: pytest.fail("it measures again"))
    pipeline = pipelines("tiny_sd35")
    options = CALL | HEADS | {"attention_share": 1.0, "resume": progress}
    sparser = calibrate(pipeline, PROMPTS, **options, heads="only", speedup=2.0)
    assert compilations == [], "plans are data"
    assert sparser.cost() <= 0.5 < only.cost()
    assert sparser.step_calibration.measured_error > only.step_calibration.measured_error
    nearer = calibrate(pipeline, PROMPTS, **options, heads="only", psnr=30.0)
    assert nearer.step_calibration.psnr >= 33.0 and nearer.cost() < 1


def test_projections_keep_their_part_of_what_your_attention_share_leaves(pipelines, progress):
    pipeline, arguments = pipelines("tiny_sd35"), {"negative_prompt": None, "scheduler": None} | CALL
    counted = shares_of(prepared(pipeline, PROMPTS, CalibrationOptions(progress=False), arguments))
    options = {"heads": "only", "attention_share": 0.8, "speedup": 1.5, "resume": progress}
    record = calibrate(pipeline, PROMPTS, **CALL, **HEADS, **options).step_calibration
    assert record is not None and record.attention_share == 0.8
    assert record.projection_share == pytest.approx(0.2 * counted.projections / (1 - counted.attention))
    assert 0.02 < record.projection_share < 0.18


def test_a_plan_in_a_file_keeps_its_shares_and_a_resolved_one_has_full_heads(only, tmp_path):
    only.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == only and again.cost() == only.cost()
    assert f"{1 / only.cost():.2f} times as fast with these heads, where attention is 1.00 of a step" in summary(only)
    faster = only.resolve(speedup=3.0)
    assert faster.heads_are_full and faster.cost() == pytest.approx(1 / 3)
    assert faster.step_calibration.tiles is None


def test_an_interruption_repeats_no_layer_that_was_tried(only, pipelines, tmp_path, monkeypatch):
    """After two layers of the second step that is tried, and in the plan's own run, whose memory is made anew."""
    options = CALL | HEADS | {"heads": "only", "attention_share": 1.0, "speedup": 1.5, "resume": tmp_path / "progress"}
    layers, ran, add, loop = len(only.setting.layers), [], Journal.add, Call.loop

    def counting(self, plan, **others):
        run = loop(self, plan, **others)
        return lambda state, start, stop: (ran.append(stop - start), run(state, start, stop))[1]

    monkeypatch.setattr(Call, "loop", counting)
    forwards = []
    for records in (10 + layers + 2, 10 + 3 * layers + 1 + 3, 10_000):  # after 6 dense steps and 4 perturbed ones

        def stop(self, *record, records=records):
            add(self, *record)
            if len(self.places) == records:
                raise KeyboardInterrupt

        monkeypatch.setattr(Journal, "add", stop)
        with nullcontext() if records == 10_000 else pytest.raises(KeyboardInterrupt):
            assert calibrate(pipelines("tiny_sd35"), PROMPTS, **options) == only
        forwards.append(sum(ran))
        ran.clear()
    # The first step, layers, and a dense forward for each step that is tried; then the plan's nodes.
    assert forwards == [1 + layers + 1 + 2 + 1, 1 + layers - 2 + 1 + layers + 1 + 3, 6]


@pytest.mark.parametrize("budget", [{"speedup": 2.0}, {"psnr": 30.0}])
def test_steps_and_heads_are_at_least_as_good_as_steps(budget, pipelines, progress):
    pipeline = pipelines("tiny_sd35")
    steps = calibrate(pipeline, PROMPTS, **CALL, heads="full", **budget, progress=False, resume=progress)
    both = calibrate(pipeline, PROMPTS, **CALL, **HEADS, attention_share=0.9, **budget, resume=progress)
    if "speedup" in budget:
        assert both.cost(0.9) <= 0.5
        assert both.step_calibration.measured_error < steps.step_calibration.measured_error
    else:
        assert both.step_calibration.psnr >= 33.0 and both.cost(0.9) < steps.cost(0.9)
    assert len(both.nodes) > len(steps.nodes) and not both.heads_are_full
    assert calibrate(pipeline, PROMPTS, **CALL, **HEADS, attention_share=0.2, **budget, resume=progress) == steps


def test_the_offset_is_what_images_have_above_their_latents(pipelines):
    """By the run that started a little off: plans of heads are allowed so much more error of the latents."""
    pipeline = pipelines("tiny_sd35")
    arguments = {"negative_prompt": None, "scheduler": None} | CALL
    call = prepared(pipeline, PROMPTS, CalibrationOptions(progress=False), arguments)
    steps = StepPlans.measured(StepRuns(call, Journal(None, ""), progress=False), {"target": "dense"})
    ended, dense = steps.started, steps.target.latents[-1]
    images = zip(*(call.pipeline.decode(call.latents(x)) for x in (ended, dense)), strict=True)
    of_images = np.mean([psnr(one[0], other[0]) for one, other in images])
    of_latents = -10 * np.log10(np.mean((ended - dense).astype(np.float64) ** 2))
    assert steps.psnr_offset == pytest.approx(of_images - of_latents, abs=0.01) and abs(steps.psnr_offset) > 1


@pytest.mark.parametrize("name", ["tiny_sd35", "tiny_flux_dev"])
def test_tables_are_what_the_sampling_loop_does(name, pipelines):
    """Errors of reuse from the outputs that the loop keeps; sensitivity from the latents after one step."""
    pipeline = pipelines(name)
    arguments = {"negative_prompt": None, "scheduler": None} | CALL
    call = prepared(pipeline, PROMPTS, CalibrationOptions(progress=False), arguments)
    runs = HeadRuns(call, (Method.arrow(4),), StepShares(0.5, 0.1), (16, 16))
    tables = runs.tables(StepRuns(call, Journal(None, ""), progress=False))
    run, state = call.program(full := Plan.full(call.setting))
    state = run(state, 0, 3)
    before = {stack: np.asarray(x) for stack, x in state.memory.items()}
    kept = jax.tree.map(jnp.copy, state)
    state = run(state, 3, 4)
    layer, number = call.layers[-1], len(call.layers) - 1
    last, now = before[layer.stack][layer.place], np.asarray(state.memory[layer.stack])[layer.place]
    squares = ((now - last) ** 2).mean((0, 1, 3)) / ((now - now.mean((0, 1, 3), keepdims=True)) ** 2).mean((0, 1, 3))
    np.testing.assert_allclose(tables.reuse[number, :, 3, 2], squares, rtol=1e-3)
    assert (np.diagonal(tables.reuse, axis1=2, axis2=3) < 1e-6).all()
    alone = full.with_method(3, number, None, CACHED_METHOD)
    changed = np.asarray(call.loop(alone)(kept, 3, 4).solver) - np.asarray(state.solver)
    assert tables.sensitivity[3, number] == pytest.approx(np.mean(changed**2) / squares.sum(), rel=0.02)  # 0.5 of 6
    assert tables.arrows.shape == (6, len(call.layers), call.setting.num_heads, 1) and (tables.arrows[1:] > 0).all()
    costs = tables.costs * call.setting.num_heads
    assert costs[:, 0].sum() == pytest.approx(0.6) and (costs[:, 1] == 0).all() and (costs[:, 2] < costs[:, 0]).all()


def test_reuse_errors_of_outputs_that_are_known():
    outputs = [{"a": np.random.default_rng(step).standard_normal((1, 2, 5, 3, 4)) + 7} for step in range(3)]
    layers = (AttentionCall("joint.0", 0, "a", 0, Layout(1, 4, False)),)
    errors = reuse_errors(layers, outputs)
    first, last = outputs[0]["a"][0][:, :, 1], outputs[2]["a"][0][:, :, 1]
    assert errors.shape == (1, 3, 3, 3)
    assert errors[0, 1, 2, 0] == pytest.approx(np.mean((last - first) ** 2) / last.var(), rel=1e-5)


def test_memory_for_two_copies_is_asked_for_before_any_step(pipelines, monkeypatch):
    pipeline = pipelines("tiny_sd35")
    size = (
        4 * 4 * pipeline.config.width * sum(layer.layout.length for layer in pipeline.setting(**CALL, prompt="").layers)
    )
    monkeypatch.setattr(StepRuns, "step", lambda *_: pytest.fail("a step runs"))
    monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices: 2 * size - 1)
    with pytest.raises(MemoryError, match=f"Attention keeps {2 * size / 1e9:.1f} GB"):
        calibrate(pipeline, PROMPTS, **CALL, **HEADS, heads="only", speedup=1.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "some"}, "heads='some' is none of 'auto', 'only' and 'full'"),
        ({"heads": "full", "windows": (4,)}, r"windows=\(4,\) is of heads, and heads='full' spares none"),
        ({"attention_share": 1.5}, "attention_share=1.5 must be a number from 0 to 1"),
        ({"c": 2.0}, "c=2.0 is of delta="),
        ({"delta": 0.1, "heads": "only"}, "heads='only' is beside speedup= or psnr="),
        ({"heads": "only", "speedup": 30.0} | HEADS, r"speedup=30.0 must be from 1 to 1\.\d+: heads alone take 0"),
        ({"heads": "only", "speedup": -1.0} | HEADS, "speedup=-1.0 must be from 1 to"),
        ({"heads": "only", "attention_chunk": 3}, "attention_chunk=3 must divide the batch of 4"),
        ({"heads": "only", "attention_chunk": 1.0}, "attention_chunk=1.0 must divide the batch of 4"),
        ({"heads": "only", "tiles": (0, 8)}, r"tiles=\(0, 8\) must be two positive integers"),
        ({"heads": "only", "tiles": 5}, "tiles=5 must be two positive integers"),
        ({"attention_share": 0.1, "tiles": (4.5, 4)}, r"tiles=\(4.5, 4\) must be two positive integers"),
        ({"attention_share": 0.1, "windows": (0,)}, r"windows=\(0,\) must be different positive integers"),
        ({"heads": "only", "num_inference_steps": 1}, "heads='only' needs two steps at least"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_step(
    options, message, pipelines, progress, monkeypatch, no_shape_checks
):
    monkeypatch.setattr(StepRuns, "step", lambda *_: pytest.fail("a step runs"))
    with pytest.raises(ValueError, match=message):
        calibrate(pipelines("tiny_sd35"), PROMPTS, **CALL | {"progress": False, "resume": progress} | options)
